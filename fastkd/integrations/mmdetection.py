"""mmdetection's detectors with a neck, with an mmengine hook.

kd = attach(runner.model, method="icd", teacher=teacher, num_classes=10)
runner.register_hook(kd.callback)
runner.train()
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain, check_trained, host_version, no_levels, warn_of_fresh_method
from fastkd.integrations.host import Attachment
from fastkd.integrations.known_teachers import (
    mmdetection_classes,
    mmdetection_normalization,
    pick_teacher,
    student_classes,
)
from fastkd.integrations.teachers import Teacher
from fastkd.integrations.traces import unrecorded_statistics
from fastkd.types import ClassPriors

KEY = "fastkd"  # key in mmengine's checkpoint, beside "state_dict"


def attach(
    model: nn.Module,
    method: str | Distiller = "icd",
    *,
    teacher: nn.Module | Teacher | None = None,
    num_classes: int | None = None,
    priors: ClassPriors | None = None,
    total_steps: int | None = None,
    **settings: Any,
) -> MMDetectionAttachment:
    """Adds a method's losses to the loss dictionary of the model in every call with mode="loss".

    Args:
        model: a plain mmdetection detector.
        method: "icd", "lgd" or a `Distiller`.
        teacher: a trained mmdetection detector, or any module in a `Teacher`. Not for "lgd".
        num_classes: object classes; None takes the head's.
        priors: class priors for ICD; None measures them from the first batches.
        total_steps: optimiser steps of the run; set automatically with `callback`.
        **settings: further arguments of `Distillation`: weight, channels, lr, weight_decay, seed.
    Raises: ValueError or TypeError if the model is not supported, or the classes do not fit.
    """
    check_plain(model)
    missing = [name for name in ("extract_feat", "loss", "data_preprocessor") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"attach: model must be an mmdetection detector, got {type(model).__name__} without {', '.join(missing)} "
            f"({host_version('mmdet')}); use fastkd.integrations.HostStep for others"
        )
    classes = student_classes(mmdetection_classes(model), num_classes)
    distillation = Distillation(
        method,
        num_classes=classes,
        priors=priors,
        two_stage=hasattr(model, "roi_head"),
        total_steps=total_steps,
        **settings,
    )
    return MMDetectionAttachment(model, distillation, pick_teacher(teacher, classes))


class MMDetectionAttachment(Attachment):
    """Hooks before and after the model and after its neck; see `attach`.

    mmengine sums the losses whose name contains "loss", so this suffix is added to the method's losses.
    """

    def __init__(self, model: Any, distillation: Distillation, teacher: Teacher | None):
        super().__init__(model, distillation, teacher, mmdetection_normalization(model))
        self._inputs: dict[str, Any] = {}
        self._levels: list[Tensor] | None = None
        self.pre_hook(model, self._keep_inputs)
        self.hook(getattr(model, "neck", None) or model.backbone, self._keep_levels)
        self.hook(model, self._add_losses)

    def _keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(zip(("inputs", "data_samples", "mode"), args)) | kwargs
        self._inputs = given if self.active and given.get("mode") == "loss" else {}
        self._levels = None

    def _keep_levels(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inputs:
            self._levels = list(output)

    def _add_losses(self, module: nn.Module, args: tuple, output: Any) -> Any:
        inputs, levels, self._inputs, self._levels = self._inputs, self._levels, {}, None
        if not inputs or inputs.get("data_samples") is None:
            return None
        losses = self.distil(inputs["inputs"].device, lambda: self._host_step(inputs, levels))
        return {**output, **{name if "loss" in name else f"{name}_loss": value for name, value in losses.items()}}

    def _host_step(self, inputs: dict[str, Any], levels: list[Tensor] | None) -> HostStep:
        if levels is None:
            raise no_levels(self.model, "neck" if getattr(self.model, "neck", None) else "backbone", "mmdet")
        images, samples, distillation = inputs["inputs"], inputs["data_samples"], self.distillation
        boxes = [sample.gt_instances.bboxes for sample in samples]
        batch = make_batch(
            images,
            [tuple(sample.img_shape[:2]) for sample in samples],
            [getattr(box, "tensor", box) for box in boxes],
            [sample.gt_instances.labels for sample in samples],
            num_classes=distillation.facts.num_classes,
            seeds=image_seeds(distillation.seed, distillation.computed, len(images)),
            check=self.check_values(images.device),
        )

        def rerun(others: list[Tensor]) -> dict[str, Tensor]:
            """The model's heads and losses on other levels; mmdetection returns some losses as lists."""
            self.model.extract_feat = lambda *args, **kwargs: tuple(others)
            try:
                with unrecorded_statistics(self.model):
                    losses = self.model.loss(images, samples)
            finally:
                del self.model.extract_feat  # restores the method of the class
            return {name: _total(value) for name, value in losses.items() if "loss" in name}

        return HostStep(batch, levels, self.pyramid_of_teacher(images, batch.image_sizes), rerun)

    @property
    def callback(self) -> Any:
        """A hook for mmengine's Runner: steps, sets the run's length, saves and resumes with its checkpoint."""
        from mmengine.hooks import Hook

        attachment = self

        class DistillationHook(Hook):
            def before_train(self, runner: Any) -> None:
                check_trained(runner.model, attachment.model)
                warn_of_fresh_method(attachment.distillation.steps, runner.iter, f"its checkpoint has no key {KEY!r}")
                accumulated = getattr(runner.optim_wrapper, "_accumulative_counts", 1)  # it has no public name
                attachment.distillation.total_steps = math.ceil(runner.max_iters / accumulated)

            def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
                if runner.optim_wrapper.should_update():
                    attachment.step()

            def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
                checkpoint[KEY] = attachment.state_dict()

            def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
                if KEY in checkpoint:
                    attachment.load_state_dict(checkpoint[KEY])

        return DistillationHook()


def _total(loss: Tensor | list[Tensor]) -> Tensor:
    """A loss as reduced by mmengine: the mean of a tensor, summed over a list."""
    if isinstance(loss, Tensor):
        return loss.mean()
    return torch.stack([part.mean() for part in loss]).sum()
