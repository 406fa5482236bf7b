"""Hugging Face's detectors with a pyramid: RT-DETR, RT-DETRv2, D-FINE, Deformable DETR; Trainer or a custom loop.

kd = attach(model, method="icd", teacher=teacher, num_classes=10)
trainer = Trainer(model, ..., callbacks=[kd.callback])       # or kd.step() after optimizer.step() in your own loop
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain, check_trained, host_version, no_levels, warn_of_fresh_method
from fastkd.integrations.host import Attachment
from fastkd.integrations.known_teachers import normalization_of, pick_teacher
from fastkd.integrations.priors import measure_priors
from fastkd.integrations.teachers import Normalization, Teacher, corners, levels_of_tokens, tokens_of_levels
from fastkd.integrations.traces import Replay, replaced_module, unrecorded_statistics
from fastkd.types import ClassPriors

FILE_NAME = "fastkd.pt"


def attach(
    model: nn.Module,
    method: str | Distiller = "icd",
    *,
    teacher: nn.Module | Teacher | None = None,
    num_classes: int | None = None,
    priors: ClassPriors | Iterable[dict[str, Any]] | None = None,
    total_steps: int | None = None,
    processor: Any = None,
    teacher_processor: Any = None,
    **settings: Any,
) -> TransformersAttachment:
    """Adds a method's losses to `outputs.loss` in every training call of the model with labels.

    Args:
        model: a plain RT-DETR, RT-DETRv2, D-FINE or Deformable DETR for object detection.
        method: "icd", "lgd" or a `Distiller`.
        teacher: a trained detector of transformers or torchvision, or any module in a `Teacher`. Not for "lgd".
        num_classes: object classes; None takes the model's.
        priors: class priors for ICD, or the training loader to measure them on; None measures them on the first
            batches.
        total_steps: optimiser steps of the run; set automatically with the callback.
        processor: the image processor, for its normalisation; None: images have values in [0, 1].
        teacher_processor: the image processor of a teacher of transformers; None: it is `processor`.
        **settings: further arguments of `Distillation`: weight, channels, lr, weight_decay, seed.
    Raises: ValueError or TypeError if the model is not supported, or the classes do not fit.
    """
    _check_attach_points(model)
    config: Any = model.config
    classes = config.num_labels
    if num_classes not in (None, classes):
        raise ValueError(
            f"attach: num_classes must be the labels of the model, {classes}, got {num_classes}; "
            "load the model with num_labels=<classes of the data>"
        )
    if priors is not None and not isinstance(priors, ClassPriors):
        priors = priors_of_loader(priors, classes)
    distillation = Distillation(method, num_classes=classes, priors=priors, total_steps=total_steps, **settings)
    picked = pick_teacher(teacher, classes, processor=teacher_processor or processor)
    return TransformersAttachment(model, distillation, picked, normalization_of(processor))


class TransformersAttachment(Attachment):
    """Hooks before and after the model; for Deformable DETR also after its backbone and its encoder; see `attach`."""

    def __init__(
        self, model: nn.Module, distillation: Distillation, teacher: Teacher | None, normalization: Normalization
    ):
        super().__init__(model, distillation, teacher, normalization)
        self._inputs: dict[str, Any] = {}
        self._as_tuple = False  # the caller asked for a tuple
        self._maps: Any = None  # Deformable DETR: output of the backbone,
        self._levels: list[Tensor] | None = None  # and of the encoder as levels
        self.callback = DistillationCallback(self)
        self.pre_hook(model, self._keep_inputs)
        if _flattens_levels(model):
            self.hook(self.model.model.backbone, self._keep_maps)
            self.hook(self.model.model.encoder, self._keep_levels, with_kwargs=True)
        self.hook(model, self._add_losses)

    def _keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Keeps the arguments of a training call, and asks for an output with names."""
        names = ("pixel_values", "pixel_mask")
        given = dict(zip(names, args)) | kwargs
        wanted = self.active and given.get("labels") is not None and given.get("pixel_values") is not None
        self._inputs, self._maps, self._levels = given if wanted else {}, None, None
        self._as_tuple = given.get("return_dict") is False
        return (args, {**kwargs, "return_dict": True}) if wanted and self._as_tuple else None

    def _keep_maps(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inputs:
            self._maps = output

    def _keep_levels(self, module: nn.Module, args: Any, kwargs: dict, output: Any) -> Any:
        """Splits the encoder's tokens into levels and joins them again, so that the host's loss depends on them."""
        if not self._inputs:
            return None
        self._levels = levels_of_tokens(output.last_hidden_state, kwargs["spatial_shapes_list"])
        output.last_hidden_state = tokens_of_levels(self._levels)
        return output

    def _add_losses(self, module: nn.Module, args: Any, output: Any) -> Any:
        inputs, levels, maps = self._inputs, self._levels, self._maps
        self._inputs, self._levels, self._maps = {}, None, None
        if not inputs:
            return None
        seen = levels if _flattens_levels(self.model) else getattr(output, "encoder_last_hidden_state", None)
        losses = self.distil(inputs["pixel_values"].device, lambda: self._host_step(inputs, seen, maps))
        if losses:
            output.loss = output.loss + sum(losses.values())
            output.loss_dict = {**(output.loss_dict or {}), **losses}
        return output.to_tuple() if self._as_tuple else output

    def _host_step(self, inputs: dict[str, Any], seen: Sequence[Tensor] | None, maps: Any) -> HostStep:
        if seen is None:
            part = "model.encoder" if _flattens_levels(self.model) else "outputs.encoder_last_hidden_state"
            raise no_levels(self.model, part, "transformers")
        images, labels, mask = inputs["pixel_values"], inputs["labels"], inputs.get("pixel_mask")
        height, width = images.shape[-2:]
        distillation = self.distillation
        batch = make_batch(
            images,
            _image_sizes(images, mask),
            [corners(label["boxes"], height, width) for label in labels],
            [label["class_labels"] for label in labels],
            num_classes=distillation.facts.num_classes,
            seeds=image_seeds(distillation.seed, distillation.computed, len(images)),
            check=self.check_values(images.device),
        )

        def rerun(levels: list[Tensor]) -> dict[str, Tensor]:
            """Decoder and loss on other levels, with newly drawn denoising queries."""
            with unrecorded_statistics(self.model):
                if maps is None:
                    encoded = BaseModelOutput(last_hidden_state=levels)
                    again = self.model.forward(
                        pixel_values=None, inputs_embeds=levels[0], encoder_outputs=encoded, labels=labels
                    )
                else:  # Deformable DETR takes tokens, and the sizes of its levels from the backbone's output
                    encoded = BaseModelOutput(last_hidden_state=tokens_of_levels(levels))
                    with replaced_module(self.model.model, backbone=Replay(maps)):
                        again = self.model.forward(images, mask, encoder_outputs=encoded, labels=labels)
            return {"loss": again.loss}

        teacher = self.pyramid_of_teacher(images, batch.image_sizes)
        return HostStep(batch, list(seen), teacher, rerun)


class DistillationCallback(transformers.TrainerCallback):
    """Steps, logs, saves and resumes an attachment with the Trainer."""

    def __init__(self, attachment: TransformersAttachment):
        self.attachment = attachment

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Sets the run's length; loads fastkd.pt from the checkpoint that the Trainer resumes from.

        Raises: ValueError if the Trainer trains another model, or wraps it in something that is not supported.
        """
        if model is not None:
            check_trained(model, self.attachment.model)
        distillation = self.attachment.distillation
        distillation.total_steps = state.max_steps
        if not state.global_step:  # not resumed
            return
        path = os.path.join(_resumed_folder() or os.path.dirname(self._path(args, state)), FILE_NAME)
        if os.path.exists(path):
            self.attachment.load(path)
        warn_of_fresh_method(distillation.steps, state.global_step, f"there is no {path}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps the method's modules after the optimiser."""
        self.attachment.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Adds the losses to the logs as fastkd/<name>."""
        values = {f"fastkd/{name}": value for name, value in self.attachment.state.losses.items()}
        if logs is not None and "loss" in logs:
            logs.update(values)
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes fastkd.pt into the Trainer's checkpoint folder."""
        path = self._path(args, state)
        if state.is_world_process_zero and os.path.isdir(os.path.dirname(path)):
            self.attachment.try_to_save(path)

    def _path(self, args: Any, state: Any) -> str:
        return os.path.join(args.output_dir, f"checkpoint-{state.global_step}", FILE_NAME)


def priors_of_loader(loader: Iterable[dict[str, Any]], num_classes: int) -> ClassPriors:
    """Class priors from one pass over a loader of the model's inputs, with "pixel_values" and "labels".

    Raises: TypeError for a loader of anything else.
    """
    return measure_priors(_targets_of(loader), num_classes)


def _targets_of(loader: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """For each image boxes [K, 4] xyxy in pixels, labels [K] and (height, width)."""
    for batch in loader:
        if not isinstance(batch, Mapping) or not {"pixel_values", "labels"} <= set(batch):
            raise TypeError(
                "attach: priors must be a ClassPriors, or a loader of the model's inputs with 'pixel_values' and "
                f"'labels', got one of {type(batch).__name__}; use fastkd.integrations.measure_priors for other data"
            )
        images = batch["pixel_values"]
        for size, label in zip(_image_sizes(images, batch.get("pixel_mask")), batch["labels"], strict=True):
            yield corners(label["boxes"], *images.shape[-2:]), label["class_labels"], size


def _image_sizes(images: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """(height, width) of each image [B, 3, H, W] before padding, by its mask [B, H, W]."""
    if mask is None:
        return [(images.shape[-2], images.shape[-1])] * len(images)
    rows, columns = mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist()
    return list(zip(rows, columns, strict=True))


def _resumed_folder() -> str | None:
    """The checkpoint of the running `Trainer.train`; None if there is none.

    The Trainer does not tell it to callbacks, and it may lie outside of `output_dir`. It is an argument of a calling
    function.
    """
    frame = inspect.currentframe()
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)):
            return os.fspath(folder)
        frame = frame.f_back
    return None


def _flattens_levels(model: Any) -> bool:
    """Whether the encoder returns the tokens of several levels in one tensor: Deformable DETR."""
    return hasattr(model.model, "level_embed") and hasattr(model.model, "backbone")


def _check_attach_points(model: Any) -> None:
    """Raises TypeError unless the model has the parts that `attach` needs."""
    check_plain(model)
    base = getattr(model, "model", None)
    if hasattr(base, "encoder") and hasattr(model, "config"):
        if hasattr(base, "decoder_input_proj") or _flattens_levels(model):
            return
        reason = "whose encoder gives tokens of a single level, not a pyramid"
    else:
        reason = "which has no encoder"
    raise TypeError(
        f"attach: model must be RT-DETR, RT-DETRv2, D-FINE or Deformable DETR for object detection, got "
        f"{type(model).__name__}, {reason} ({host_version('transformers')}); use "
        "fastkd.integrations.HostStep with other levels, for instance the backbone's"
    )
