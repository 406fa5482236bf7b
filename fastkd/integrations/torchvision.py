"""torchvision's detectors in any loop that calls model(images, targets): RetinaNet, FCOS, SSD, Faster and Mask R-CNN.

kd = attach(model, method="icd", teacher=teacher, num_classes=10)
...                     # losses = model(images, targets) includes "icd_distill", ...
kd.step()               # after optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain, host_version, no_levels
from fastkd.integrations.host import Attachment
from fastkd.integrations.known_teachers import has_background, image_normalization, output_classes, pick_teacher
from fastkd.integrations.priors import measure_priors
from fastkd.integrations.teachers import Teacher
from fastkd.integrations.traces import Replay, replaced_module, unrecorded_statistics
from fastkd.types import ClassPriors


def attach(
    model: nn.Module,
    method: str | Distiller = "icd",
    *,
    teacher: nn.Module | Teacher | None = None,
    num_classes: int | None = None,
    priors: ClassPriors | Iterable[Any] | None = None,
    total_steps: int | None = None,
    **settings: Any,
) -> TorchvisionAttachment:
    """Adds a method's losses to the loss dictionary of the model in every training call.

    Args:
        model: a plain torchvision detector, not compiled and not wrapped.
        method: "icd", "lgd", "fgfi" or a `Distiller`.
        teacher: a trained torchvision detector, or any module in a `Teacher`. Not for "lgd".
        num_classes: object classes without background; None takes the model's. If the model has one class more, class 0
            is its background and labels begin at 1.
        priors: class priors for ICD, or the training loader to measure them on; None measures them on the first
            batches.
        total_steps: optimiser steps of the run, for the schedule of the method.
        **settings: further arguments of `Distillation`: weight, channels, lr, weight_decay, seed.
    Raises: ValueError or TypeError if the model is not supported, or teacher, classes or priors do not fit.
    """
    _check_attach_points(model)
    classes, first_label = _classes(model, num_classes)
    if priors is not None and not isinstance(priors, ClassPriors):
        priors = priors_of_loader(priors, classes, first_label)
    distillation = Distillation(
        method,
        num_classes=classes,
        priors=priors,
        two_stage=hasattr(model, "roi_heads"),
        anchors=_anchors(model),
        total_steps=total_steps,
        **settings,
    )
    return TorchvisionAttachment(model, distillation, pick_teacher(teacher, classes), first_label)


class TorchvisionAttachment(Attachment):
    """Hooks on `transform`, `backbone` and the model; see `attach`.

    Args:
        model, distillation, teacher: as in `Attachment`.
        first_label: the label of the first class in the targets.
    """

    def __init__(self, model: Any, distillation: Distillation, teacher: Teacher | None, first_label: int):
        super().__init__(model, distillation, teacher, image_normalization(model))
        self.first_label = first_label
        self._inputs: Any = None
        self._features: Any = None
        self.hook(model.transform, self._keep_inputs)
        self.hook(model.backbone, self._keep_features)
        self.hook(model, self._add_losses, with_kwargs=True)

    def _keep_inputs(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            self._inputs = output

    def _keep_features(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            self._features = output

    def _add_losses(self, module: nn.Module, args: Any, kwargs: dict, output: Any) -> dict[str, Tensor] | None:
        inputs, features, self._inputs, self._features = self._inputs, self._features, None, None
        given = dict(zip(("images", "targets"), args)) | kwargs
        if not self.active or given.get("targets") is None:
            return None
        losses = self.distil(given["images"][0].device, lambda: self._host_step(inputs, features))
        return {**output, **losses}

    def _host_step(self, inputs: Any, features: Any) -> HostStep:
        if inputs is None or features is None:
            raise no_levels(self.model, "transform" if inputs is None else "backbone", "torchvision")
        images, targets = inputs
        distillation, size = self.distillation, images.tensors.shape[0]
        batch = make_batch(
            images.tensors,
            images.image_sizes,
            [target["boxes"] for target in targets],
            [target["labels"] for target in targets],
            num_classes=distillation.facts.num_classes,
            first_label=self.first_label,
            masks=[target["masks"] for target in targets] if distillation.wants_masks else None,
            seeds=image_seeds(distillation.seed, distillation.computed, size),
            check=self.check_values(images.tensors.device),
        )
        names = None if isinstance(features, Tensor) else list(features)
        student = [features] if names is None else list(features.values())

        def rerun(levels: list[Tensor]) -> dict[str, Tensor]:
            """The model's head and loss on other levels: its forward pass with recorded transform and given levels."""
            output = levels[0] if names is None else dict(zip(names, levels, strict=True))
            replayed = replaced_module(self.model, transform=_ReplayTransform(inputs), backbone=Replay(output))
            with unrecorded_statistics(self.model), replayed:
                return self.model.forward(list(images.tensors), targets)

        teacher = self.pyramid_of_teacher(images.tensors, batch.image_sizes)
        return HostStep(batch, student, teacher, rerun)


class _ReplayTransform(Replay):
    """A recorded `transform`, with the method `postprocess` that R-CNNs call as well."""

    def postprocess(self, result: Any, *args: Any) -> Any:
        """Returns the result unchanged, as in train mode."""
        return result


def priors_of_loader(loader: Iterable[Any], num_classes: int, first_label: int) -> ClassPriors:
    """Class priors from one pass over a loader of (images, targets) in torchvision's format."""
    triples = (
        (target["boxes"], target["labels"], tuple(image.shape[-2:]))
        for images, targets in loader
        for image, target in zip(images, targets)
    )
    return measure_priors(triples, num_classes, first_label=first_label)


def _classes(model: nn.Module, num_classes: int | None) -> tuple[int, int]:
    """Number of object classes, and the label of the first class."""
    outputs, background = output_classes(model), has_background(model)
    if num_classes is None:
        return (outputs - 1, 1) if background else (outputs, 0)
    if num_classes == outputs - 1:
        return num_classes, 1
    if num_classes == outputs and not background:
        return num_classes, 0
    raise ValueError(
        f"attach: num_classes must be the object classes of the model, {outputs - 1}"
        f"{'' if background else f' or {outputs}'}, got {num_classes}; build the model for the classes of the data"
    )


def _anchors(model: Any) -> list[Tensor] | None:
    """The anchors of the cell at the origin, level by level; None for other anchor generators (SSD)."""
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    return [anchors.clone() for anchors in generator.cell_anchors] if hasattr(generator, "cell_anchors") else None


def _check_attach_points(model: nn.Module) -> None:
    """Raises TypeError unless the model has the parts that `attach` needs."""
    check_plain(model)
    missing = [name for name in ("transform", "backbone") if not isinstance(getattr(model, name, None), nn.Module)]
    if not hasattr(model, "roi_heads") and not hasattr(getattr(model, "head", None), "classification_head"):
        missing.append("roi_heads or head.classification_head")
    if missing:
        raise TypeError(
            f"attach: model must be a torchvision detector, got {type(model).__name__} without {', '.join(missing)} "
            f"({host_version('torchvision')}); use fastkd.integrations.HostStep for other detectors"
        )
