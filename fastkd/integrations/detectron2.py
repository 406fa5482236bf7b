"""detectron2's detectors with a feature pyramid, in its trainers or in a custom loop.

kd = attach(trainer.model, method="icd", teacher=teacher, num_classes=10)
trainer.register_hooks([kd.callback])                        # or kd.step() after optimizer.step() in your own loop
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain, check_trained, host_version, no_levels, warn_of_fresh_method
from fastkd.integrations.host import Attachment
from fastkd.integrations.known_teachers import (
    detectron2_classes,
    detectron2_normalization,
    pick_teacher,
    student_classes,
)
from fastkd.integrations.teachers import Teacher
from fastkd.integrations.traces import Replay, replaced_module, unrecorded_statistics
from fastkd.types import ClassPriors

LOG_EVERY = 20  # iterations between two writes of the losses, as in detectron2's writers


def attach(
    model: nn.Module,
    method: str | Distiller = "icd",
    *,
    teacher: nn.Module | Teacher | None = None,
    num_classes: int | None = None,
    priors: ClassPriors | None = None,
    total_steps: int | None = None,
    **settings: Any,
) -> Detectron2Attachment:
    """Adds a method's losses to the loss dictionary of the model in every training call.

    Args:
        model: a plain detectron2 detector with `backbone` and `preprocess_image`.
        method: "icd", "lgd" or a `Distiller`.
        teacher: a trained detector of detectron2, or any module in a `Teacher`. Not for "lgd".
        num_classes: object classes; None takes the model's.
        priors: class priors for ICD; None measures them from the first batches.
        total_steps: optimiser steps of the run; set automatically with `callback`.
        **settings: further arguments of `Distillation`: weight, channels, lr, weight_decay, seed.
    Raises: ValueError or TypeError if the model is not supported, or the classes do not fit.
    """
    check_plain(model)
    missing = [name for name in ("backbone", "preprocess_image", "pixel_mean") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"attach: model must be a detectron2 detector, got {type(model).__name__} without {', '.join(missing)} "
            f"({host_version('detectron2')}); use fastkd.integrations.HostStep for others"
        )
    classes = student_classes(detectron2_classes(model), num_classes)
    distillation = Distillation(
        method,
        num_classes=classes,
        priors=priors,
        two_stage=hasattr(model, "roi_heads"),
        total_steps=total_steps,
        **settings,
    )
    return Detectron2Attachment(model, distillation, pick_teacher(teacher, classes))


class Detectron2Attachment(Attachment):
    """Hooks before and after the model and after its backbone; see `attach`."""

    def __init__(self, model: Any, distillation: Distillation, teacher: Teacher | None):
        super().__init__(model, distillation, teacher, detectron2_normalization(model))
        self._inputs: list[dict] | None = None
        self._features: tuple[Tensor, dict[str, Tensor]] | None = None
        self.pre_hook(model, self._keep_inputs)
        self.hook(model.backbone, self._keep_features)
        self.hook(model, self._add_losses)

    def _keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs, self._features = (args[0] if self.active else None), None

    def _keep_features(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inputs is not None:
            self._features = args[0], output

    def _add_losses(self, module: nn.Module, args: tuple, output: Any) -> Any:
        inputs, features, self._inputs, self._features = self._inputs, self._features, None, None
        if inputs is None:
            return None
        return {**output, **self.distil(self.model.pixel_mean.device, lambda: self._host_step(inputs, features))}

    def _host_step(self, inputs: list[dict], seen: tuple[Tensor, dict[str, Tensor]] | None) -> HostStep:
        if seen is None:
            raise no_levels(self.model, "backbone", "detectron2")
        images, features = seen
        distillation, instances = self.distillation, [entry["instances"] for entry in inputs]
        batch = make_batch(
            images,
            [tuple(entry["image"].shape[-2:]) for entry in inputs],
            [entry.gt_boxes.tensor for entry in instances],
            [entry.gt_classes for entry in instances],
            num_classes=distillation.facts.num_classes,
            seeds=image_seeds(distillation.seed, distillation.computed, len(inputs)),
            check=self.check_values(images.device),
        )

        def rerun(levels: list[Tensor]) -> dict[str, Tensor]:
            """The model's heads and losses on other levels: its forward pass with the backbone's output replaced."""
            replay: Any = Replay(dict(zip(features, levels, strict=True)))
            replay.size_divisibility = self.model.backbone.size_divisibility
            replay.padding_constraints = getattr(self.model.backbone, "padding_constraints", {})
            with (
                _without_side_effects(self.model),
                unrecorded_statistics(self.model),
                replaced_module(self.model, backbone=replay),
            ):
                return self.model.forward(inputs)

        return HostStep(batch, list(features.values()), self.pyramid_of_teacher(images, batch.image_sizes), rerun)

    @property
    def callback(self) -> Any:
        """A hook for detectron2's trainers: steps, sets the run's length, saves and resumes with the trainer."""
        from detectron2.engine import HookBase

        attachment = self

        class DistillationHook(HookBase):
            def before_train(self) -> None:
                check_trained(getattr(self.trainer, "model", attachment.model), attachment.model)
                missing = "its checkpoint has no state of DistillationHook"
                warn_of_fresh_method(attachment.distillation.steps, self.trainer.start_iter, missing)
                attachment.distillation.total_steps = self.trainer.max_iter

            def after_step(self) -> None:
                attachment.step()
                storage = getattr(self.trainer, "storage", None)
                if storage is not None and self.trainer.iter % LOG_EVERY == 0:
                    storage.put_scalars(**{f"fastkd/{k}": float(v) for k, v in attachment.losses.items()})

            def state_dict(self) -> dict[str, Any]:
                return attachment.state_dict()

            def load_state_dict(self, state: dict[str, Any]) -> None:
                attachment.load_state_dict(state)

        return DistillationHook()


@contextlib.contextmanager
def _without_side_effects(model: nn.Module) -> Iterator[None]:
    """Within the context scalars go to a separate EventStorage, and loss normalisers are restored afterwards."""
    from detectron2.utils.events import EventStorage

    normalizers = {part: part.loss_normalizer for part in model.modules() if hasattr(part, "loss_normalizer")}
    try:
        with EventStorage(1):  # not 0, at which a model with a vis_period would draw its proposals
            yield
    finally:
        for part, value in normalizers.items():
            part.loss_normalizer = value
