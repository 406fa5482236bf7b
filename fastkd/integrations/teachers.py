"""A frozen teacher of any architecture, which computes its pyramid from the student's images."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.integrations.pyramids import check_pyramid


@dataclass(frozen=True)
class Normalization:
    """images = (pixels in [0, 1] - mean) / std, per channel."""

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def renormalize(images: Tensor, image_sizes: Tensor, before: Normalization, after: Normalization) -> Tensor:
    """Converts images to another normalisation, with zeros in the padding.

    Args:
        images: [B, 3, H, W].
        image_sizes: [B, 2] height and width before padding.
        before, after: the present and the wanted normalisation.
    """
    if before == after:
        return images
    ratios = [b / a for b, a in zip(before.std, after.std, strict=True)]
    offsets = [(m - n) / a for m, n, a in zip(before.mean, after.mean, after.std, strict=True)]
    scale, shift = (images.new_tensor(values)[:, None, None] for values in (ratios, offsets))
    moved = images * scale + shift
    height, width = image_sizes.to(images.device).unbind(1)
    rows = torch.arange(images.shape[2], device=images.device) < height[:, None]
    columns = torch.arange(images.shape[3], device=images.device) < width[:, None]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], moved, 0.0)


def pixels(images: Tensor, image_sizes: Tensor, normalization: Normalization) -> list[Tensor]:
    """The images [3, h, w] of a padded batch in [0, 1]."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (normalization.mean, normalization.std))
    sizes = image_sizes.tolist()
    return [(image[:, :h, :w] * std + mean).float().clamp(0, 1) for image, (h, w) in zip(images, sizes)]


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Normalised cxcywh [K, 4] -> xyxy in pixels."""
    center, size = boxes.float().split(2, dim=1)
    return torch.cat([center - size / 2, center + size / 2], 1) * boxes.new_tensor([width, height, width, height])


def levels_of_tokens(tokens: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tokens [B, sum of H_l * W_l, C] of levels of these sizes (H_l, W_l) -> L tensors [B, C, H_l, W_l]."""
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [part.transpose(1, 2).unflatten(2, tuple(size)) for part, size in zip(parts, sizes, strict=True)]


def tokens_of_levels(levels: Sequence[Tensor]) -> Tensor:
    """The inverse of `levels_of_tokens`."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def levels_of(output: Any) -> list[Tensor]:
    """The list of levels in the output of a backbone, neck or encoder: a tensor, list, dictionary or model output."""
    for name in ("feature_maps", "encoder_last_hidden_state", "last_hidden_state"):
        if not isinstance(output, (Tensor, list, tuple)) and getattr(output, name, None) is not None:
            output = getattr(output, name)
    if isinstance(output, Mapping):
        output = list(output.values())
    return [output] if isinstance(output, Tensor) else list(output)


class Teacher:
    """A frozen teacher. It is never a submodule of the student, so that the host does not unfreeze, train or save it.

    Args:
        module: the teacher; set to eval mode, its parameters frozen.
        features: function images [B, 3, H, W] -> levels; None takes the first that exists of `module.features`,
            `module.extract_feat` (mmdetection), `module.backbone` (torchvision) and `module`.
        normalization: image normalisation of the teacher's training; None: the same as the student's.
        detect: images [3, h, w] in [0, 1] -> (boxes, labels from 0, scores) of each, for `report`; None if unknown.
        num_classes: number of classes of the teacher, if known.
        scores: levels -> L tensors [B, 1, H_l, W_l] in [0, 1], the highest class probability of each cell, for
            score-weighted L2; None if unknown.
    """

    usually_in_train_mode = False  # a module in train mode is no sign of a mistake

    def __init__(
        self,
        module: nn.Module,
        features: Callable[[Tensor], Any] | None = None,
        *,
        normalization: Normalization | None = None,
        detect: Callable[[Sequence[Tensor]], Sequence[tuple[Tensor, Tensor, Tensor]]] | None = None,
        num_classes: int | None = None,
        scores: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.module, self.features, self.scores = module, features or find_features(module), scores
        self.normalization, self.num_classes = normalization, num_classes
        self.detect = None if detect is None else functools.partial(self._detect, detect)
        self._modes = [(part, part.training) for part in module.modules()]
        self._parameters = [(each, each.requires_grad) for each in module.parameters()]
        self._dtype = next((each.dtype for each, _ in self._parameters), None)
        self._frozen = False
        if any(training for _, training in self._modes) and not self.usually_in_train_mode:
            warnings.warn(
                "fastkd: the teacher was in train mode, its batch norms would follow the student's images; it is set "
                "to eval mode now. Call teacher.eval() before attaching",
                stacklevel=3,
            )
        self.freeze()

    def freeze(self) -> None:
        """Eval mode and no gradients."""
        self.module.eval()
        self.module.requires_grad_(False)
        self._frozen = True

    def restore(self) -> None:
        """The modes, dtype and `requires_grad` with which the module was given; the next use freezes it again."""
        for part, training in self._modes:
            part.training = training
        for parameter, wanted in self._parameters:
            parameter.requires_grad_(wanted)
        if self._dtype is not None and self._dtype != self._parameters[0][0].dtype:
            self.module.to(self._dtype)
        self._frozen = False

    def _detect(
        self, detect: Callable[[Sequence[Tensor]], Any], images: Sequence[Tensor]
    ) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
        """Detections of the frozen teacher, also after `restore`."""
        restored = not self._frozen
        self.freeze()
        found = detect(images)
        if restored:
            self.restore()
        return found

    @torch.no_grad()
    def pyramid(self, images: Tensor, image_sizes: Tensor, normalization: Normalization) -> list[Tensor]:
        """The teacher's levels for the student's images [B, 3, H, W], given with their normalisation."""
        if self.module.training or not self._frozen:  # a host may have set all modules to train mode
            self.freeze()
        images = renormalize(images, image_sizes, normalization, self.normalization or normalization)
        return check_pyramid("teacher", levels_of(self.features(images)), images.shape[0])

    @torch.no_grad()
    def cell_scores(self, levels: Sequence[Tensor]) -> list[Tensor] | None:
        """The highest class probability in each cell of its levels; None if the teacher has no `scores`."""
        return None if self.scores is None else list(self.scores(list(levels)))

    def to(self, device: torch.device) -> None:
        """Moves the teacher to a device, if necessary."""
        first = next(self.module.parameters(), None)
        if first is not None and first.device != device:
            self.module.to(device)


def find_features(module: nn.Module) -> Callable[[Tensor], Any]:
    """The part of a detector that computes its pyramid."""
    for name in ("features", "extract_feat", "backbone"):
        part = getattr(module, name, None)
        if callable(part):
            return part
    return module


class _StopForward(Exception):
    """Stops a forward pass and carries the captured tensors."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


def _stop_after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if "spatial_shapes_list" in kwargs:  # Deformable DETR flattens its levels
        output = levels_of_tokens(output.last_hidden_state, kwargs["spatial_shapes_list"])
    raise _StopForward(output)


def _stop_before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    raise _StopForward(args[0])


def features_until(module: nn.Module, part: nn.Module) -> Callable[[Tensor], Any]:
    """A function images -> output of `part` in the module's forward pass, which is stopped after `part`."""
    return functools.partial(_run_to, module, part, part.register_forward_hook, _stop_after)


def features_before(module: nn.Module, part: nn.Module) -> Callable[[Tensor], Any]:
    """A function images -> input of `part` in the module's forward pass, which is stopped before `part`."""
    return functools.partial(_run_to, module, part, part.register_forward_pre_hook, _stop_before)


def _run_to(
    module: nn.Module, part: nn.Module, register: Callable[..., Any], stop: Callable[..., None], images: Tensor
) -> Any:
    handle = register(stop, with_kwargs=True)
    try:
        module(images)
    except _StopForward as reached:
        return reached.output
    finally:
        handle.remove()
    raise ValueError(
        f"Teacher: the forward pass of {type(module).__name__} must run {type(part).__name__}, it did not; name the "
        "part that makes the pyramid"
    )
