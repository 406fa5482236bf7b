"""Hugging Face's detectors with a pyramid: RT-DETR, RT-DETRv2, D-FINE, Deformable DETR; Trainer or a custom loop.

kd = attach(model, method="icd", teacher=teacher, num_classes=10)
trainer = Trainer(model, ..., callbacks=[kd.callback])       # or kd.step() after optimizer.step() in your own loop
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain
from fastkd.integrations.host import Attachment
from fastkd.integrations.known_teachers import normalization_of, pick_teacher
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
    priors: ClassPriors | None = None,
    total_steps: int | None = None,
    processor: Any = None,
    **settings: Any,
) -> TransformersAttachment:
    """Adds a method's losses to `outputs.loss` in every training call of the model with labels.

    Args:
        model: a plain RT-DETR, RT-DETRv2, D-FINE or Deformable DETR for object detection.
        method: "icd", "lgd" or a `Distiller`.
        teacher: a trained detector of transformers or torchvision, or any module in a `Teacher`. Not for "lgd".
        num_classes: object classes; None takes the model's.
        priors: class priors for ICD; None measures them from the first batches.
        total_steps: optimiser steps of the run; set automatically with the callback.
        processor: the image processor, for its normalisation; None: images have values in [0, 1].
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
    distillation = Distillation(method, num_classes=classes, priors=priors, total_steps=total_steps, **settings)
    return TransformersAttachment(model, distillation, pick_teacher(teacher, classes), normalization_of(processor))


class TransformersAttachment(Attachment):
    """Hooks before and after the model; for Deformable DETR also after its backbone and its encoder; see `attach`."""

    def __init__(
        self, model: nn.Module, distillation: Distillation, teacher: Teacher | None, normalization: Normalization
    ):
        super().__init__(model, distillation, teacher, normalization)
        self._inputs: dict[str, Any] = {}
        self._maps: Any = None  # Deformable DETR: output of the backbone,
        self._levels: list[Tensor] | None = None  # and of the encoder as levels
        self.callback = DistillationCallback(self)
        self.pre_hook(model, self._keep_inputs)
        if _flattens_levels(model):
            self.hook(self.model.model.backbone, self._keep_maps)
            self.hook(self.model.model.encoder, self._keep_levels, with_kwargs=True)
        self.hook(model, self._add_losses)

    def _keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        names = ("pixel_values", "pixel_mask")
        self._inputs = dict(zip(names, args)) | kwargs if self.active else {}
        self._maps = self._levels = None

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
        labels, images = inputs.get("labels"), inputs.get("pixel_values")
        if not self.active or labels is None or images is None:
            return None
        levels = list(output.encoder_last_hidden_state) if levels is None else levels
        losses = self.distil(images.device, lambda: self._host_step(inputs, levels, maps))
        if losses:
            output.loss = output.loss + sum(losses.values())
            output.loss_dict = {**(output.loss_dict or {}), **losses}
        return output

    def _host_step(self, inputs: dict[str, Any], student: list[Tensor], maps: Any) -> HostStep:
        images, labels, mask = inputs["pixel_values"], inputs["labels"], inputs.get("pixel_mask")
        height, width = images.shape[-2:]
        sizes = [(height, width)] * len(images)
        if mask is not None:
            rows, columns = mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist()
            sizes = list(zip(rows, columns, strict=True))
        distillation = self.distillation
        batch = make_batch(
            images,
            sizes,
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
        return HostStep(batch, student, teacher, rerun)


class DistillationCallback(transformers.TrainerCallback):
    """Steps, logs, saves and resumes an attachment with the Trainer."""

    def __init__(self, attachment: TransformersAttachment):
        self.attachment = attachment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the run's length; loads the checkpoint that the Trainer resumes from."""
        self.attachment.distillation.total_steps = state.max_steps
        path = self._path(args, state)
        if state.global_step and os.path.exists(path):
            self.attachment.load(path)

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
        f"{type(model).__name__}, {reason} (transformers {transformers.__version__}); use "
        "fastkd.integrations.HostStep with other levels, for instance the backbone's"
    )
