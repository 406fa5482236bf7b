"""Converts detector checkpoints of torchvision and detectron2.

RetinaNet, Faster R-CNN and Mask R-CNN with a ResNet-50 or -101 and a feature pyramid. Differences of the originals
become settings (stride in the 1x1 convolution, exact anchors, aligned pooling, P6 from C5) or are folded into the
weights (BGR input without division, other orders of classes and anchors, no box and mask of the background).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastkd.detectors.build import build_detector
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector
from fastkd.detectors.weights.array_pickle import read_array_pickle
from fastkd.detectors.weights.coco_classes import COCO_CLASSES
from fastkd.detectors.weights.files import MatchReport, check_finite, copy_tensors, match_tensors, read_state_dict

_TORCHVISION = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)", r"neck.\1_blocks.\2.0.\3"),
    (r"backbone\.fpn\.(.+)", r"neck.\1"),
    (r"head\.(classification|regression)_head\.conv\.0\.(weight|bias)", r"head.\1_head.conv.0.0.\2"),
    (r"head\.(classification|regression)_head\.conv\.2\.(weight|bias)", r"head.\1_head.conv.1.0.\2"),
    (r"head\.(classification|regression)_head\.conv\.4\.(weight|bias)", r"head.\1_head.conv.2.0.\2"),
    (r"head\.(classification|regression)_head\.conv\.6\.(weight|bias)", r"head.\1_head.conv.3.0.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"head.rpn.head.conv.0.0.\1"),
    *((rf"roi_heads\.mask_head\.mask_fcn{i}\.(.+)", rf"head.roi_heads.mask_head.{i - 1}.0.\1") for i in range(1, 5)),
    (r"(rpn|roi_heads)\.(.+)", r"head.\1.\2"),
)
_STAGES = tuple((f"res{i + 1}", f"layer{i}") for i in range(1, 5))
_DETECTRON2 = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(.+)", r"backbone.bn1.\1"),
    (r"backbone\.bottom_up\.stem\.conv1\.(.+)", r"backbone.conv1.\1"),
    *((rf"backbone\.bottom_up\.{a}\.(\d+)\.conv(\d)\.norm\.(.+)", rf"backbone.{b}.\1.bn\2.\3") for a, b in _STAGES),
    *((rf"backbone\.bottom_up\.{a}\.(\d+)\.conv(\d)\.(.+)", rf"backbone.{b}.\1.conv\2.\3") for a, b in _STAGES),
    *(
        (rf"backbone\.bottom_up\.{a}\.(\d+)\.shortcut\.norm\.(.+)", rf"backbone.{b}.\1.downsample.1.\2")
        for a, b in _STAGES
    ),
    *((rf"backbone\.bottom_up\.{a}\.(\d+)\.shortcut\.(.+)", rf"backbone.{b}.\1.downsample.0.\2") for a, b in _STAGES),
    (r"backbone\.top_block\.(.+)", r"neck.extra_blocks.\1"),
    *((rf"head\.cls_subnet\.{2 * i}\.(.+)", rf"head.classification_head.conv.{i}.0.\1") for i in range(4)),
    *((rf"head\.bbox_subnet\.{2 * i}\.(.+)", rf"head.regression_head.conv.{i}.0.\1") for i in range(4)),
    (r"head\.cls_score\.(.+)", r"head.classification_head.cls_logits.\1"),
    (r"head\.bbox_pred\.(.+)", r"head.regression_head.bbox_reg.\1"),
    (r"proposal_generator\.rpn_head\.conv\.(.+)", r"head.rpn.head.conv.0.0.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.+)", r"head.rpn.head.cls_logits.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.+)", r"head.rpn.head.bbox_pred.\1"),
    (r"roi_heads\.box_head\.fc1\.(.+)", r"head.roi_heads.box_head.fc6.\1"),
    (r"roi_heads\.box_head\.fc2\.(.+)", r"head.roi_heads.box_head.fc7.\1"),
    (r"roi_heads\.box_predictor\.(.+)", r"head.roi_heads.box_predictor.\1"),
    *((rf"roi_heads\.mask_head\.mask_fcn{i}\.(.+)", rf"head.roi_heads.mask_head.{i - 1}.0.\1") for i in range(1, 5)),
    (r"roi_heads\.mask_head\.deconv\.(.+)", r"head.roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_heads\.mask_head\.predictor\.(.+)", r"head.roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
_TORCHVISION_CLASSES = {  # for dense and two-stage detectors: layers with outputs per class, and values per class
    True: {"head.classification_head.cls_logits": 1},
    False: {
        "head.roi_heads.box_predictor.cls_score": 1,
        "head.roi_heads.box_predictor.bbox_pred": 4,
        "head.roi_heads.mask_predictor.mask_fcn_logits": 1,
    },
}
_NO_WEIGHTS = re.compile(r".*(num_batches_tracked|cell_anchors\.\d+)|pixel_(mean|std)")
_IMAGENET_STD = (58.395, 57.12, 57.375)  # divisors of our images, RGB
_BGR_MEAN = (103.53, 116.28, 123.675)
_DEPTHS = {6: "resnet50", 23: "resnet101"}
_TORCHVISION_ROWS = 91  # COCO's category ids 0 .. 90, of which 80 are used


@dataclass(frozen=True)
class Conversion:
    """A converted detector.

    Args:
        detector: in eval mode, on the CPU.
        class_names: by label.
        origin: "torchvision" or "detectron2".
        report: which tensors matched; always complete.
        notes: changes of the weights, for the user.
    """

    detector: Detector
    class_names: list[str]
    origin: str
    report: MatchReport
    notes: tuple[str, ...]


def convert_checkpoint(
    path: str | os.PathLike, class_names: Sequence[str] | None = None, *, norm_eps: float | None = None
) -> Conversion:
    """Convert a checkpoint of torchvision or detectron2.

    Args:
        path: .pth, .pt or .safetensors, or detectron2's .pkl; nothing in it is executed.
        class_names: by label; None for COCO's 80 classes.
        norm_eps: eps of the original's frozen batch norms. None: 0 for torchvision's COCO files with frozen norms (as
            its published models use), else 1e-5.
    Returns: the detector and a report of its tensors.
    Raises: FileNotFoundError; ValueError if the file is damaged or hostile, contains another kind of detector, has
        missing or unused tensors, or has another number of classes.
    """
    path = Path(path)
    tensors = read_tensors(path)
    if any(name.startswith("backbone.bottom_up.") for name in tensors):
        return convert_detectron2(tensors, class_names, where=str(path))
    if any(name.startswith("backbone.body.") for name in tensors):
        return convert_torchvision(tensors, class_names, norm_eps=norm_eps, where=str(path))
    raise ValueError(
        f"convert: {path} must be a detector of torchvision (backbone.body...) or detectron2 (backbone.bottom_up...), "
        f"got tensors named {', '.join(list(tensors)[:3])}...; a classifier's file goes to --backbone-weights"
    )


def convert_detectron2(
    tensors: Mapping[str, Tensor], class_names: Sequence[str] | None = None, *, where: str = "the state dict"
) -> Conversion:
    """A model of detectron2's zoo (caffe-style ResNet, BGR) from its state dict. Arguments: see convert_checkpoint."""
    kind = _kind(tensors, "head.cls_subnet.", "roi_heads.box_head.fc1.", "roi_heads.mask_head.", where)
    _require_pyramid(tensors, "backbone.fpn_output", where)
    dense = kind == "retinanet"
    named = _renamed(tensors, (*_DETECTRON2, *_fpn_rules(3 if dense else 2)))
    _check_pixels(tensors, where)
    names = _class_names(class_names, _classes_of_detectron2(named, dense, where), where)
    config = DetectorConfig(
        detector=kind,
        num_classes=len(names),
        backbone=_backbone(named, where),
        stride_in_1x1=True,
        p6_source="c5" if dense else "p5",
        anchor_rounding=False,
        roi_aligned=not dense,
        frozen_stages=2,
    )
    scale = torch.tensor(_IMAGENET_STD)[:, None, None]
    stem = _tensor(named, "backbone.conv1.weight", where)
    if stem.ndim == 4 and stem.shape[1] == 3:
        named["backbone.conv1.weight"] = stem.float().flip(1) * scale
    _permute_anchors(named, "head.classification_head.cls_logits", len(names))
    _permute_anchors(named, "head.regression_head.bbox_reg", 4)
    _move_background(named, len(names))
    notes: tuple[str, ...]
    notes = ("input channels turned from BGR to RGB, division by the standard deviation taken into the first layer",)
    notes += ("anchors sorted by ratio first",) if dense else ("background put first, its box and mask added as zeros",)
    return _finish(config, named, names, "detectron2", notes, where)


def convert_torchvision(
    tensors: Mapping[str, Tensor],
    class_names: Sequence[str] | None = None,
    *,
    norm_eps: float | None = None,
    where: str = "the state dict",
) -> Conversion:
    """A model of torchvision.models.detection from its state dict. Arguments: see convert_checkpoint."""
    kind = _kind(tensors, "head.classification_head.", "roi_heads.box_head.fc6.", "roi_heads.mask_head.", where)
    _require_pyramid(tensors, "backbone.fpn.inner_blocks", where)
    named = _renamed(tensors, _TORCHVISION)
    dense = kind == "retinanet"
    layers = _TORCHVISION_CLASSES[dense]
    rows = _tensor(named, f"{next(iter(layers))}.bias", where).shape[0] // (9 if dense else 1)
    if rows < 2:
        raise ValueError(f"convert: {where} must have a class beside the background, got {rows} in all")
    if class_names is None and rows != _TORCHVISION_ROWS:
        raise ValueError(
            f"convert: class names must be given for {where}, whose {rows} classes are not COCO's; pass --annotations"
        )
    coco = rows == _TORCHVISION_ROWS and (class_names is None or len(class_names) == len(COCO_CLASSES))
    kept = list(COCO_CLASSES) if coco else list(range(1, rows))
    names = _class_names(class_names, len(kept), where)
    trainable = any(name.endswith("num_batches_tracked") for name in tensors)
    config = DetectorConfig(
        detector=kind,
        num_classes=len(names),
        backbone=_backbone(named, where),
        norm="bn" if trainable else "frozen_bn",
        head_norm="gn" if "head.classification_head.conv.0.1.weight" in named else "none",
        p6_source="c5" if dense and _columns(named, "neck.extra_blocks.p6.weight") == 2048 else "p5",
        frozen_stages=2,
    )
    _select_classes(named, layers, rows, kept if dense else [0, *kept])
    notes: tuple[str, ...] = (f"classes {kept[0]} .. {kept[-1]} of {rows}: {len(kept)} kept",)
    if norm_eps is None:
        norm_eps = 0.0 if coco and not trainable else 1e-5
    if norm_eps != 1e-5:
        _change_eps(named, norm_eps)
        notes += (f"eps {norm_eps:g} of the original's batch norms worked into their weights",)
    return _finish(config, named, names, "torchvision", notes, where)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All named tensors of a file."""
    if path.suffix != ".pkl":
        return read_state_dict("convert", path)
    content = read_array_pickle(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"convert: {path} must hold named arrays, got {type(content).__name__}")
    tensors = {
        name: torch.from_numpy(value.copy())
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    }
    if not tensors:
        raise ValueError(f"convert: {path} must hold named arrays, got none")
    return tensors


def _kind(tensors: Mapping[str, Tensor], dense: str, boxes: str, masks: str, where: str) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    other = next(
        (name for name in tensors if re.match(r"roi_heads\.(keypoint|box_head\.\d)|.*\.bbox_ctrness", name)), None
    )
    if other is not None or not (has(dense) or has(boxes)):
        found = other or ", ".join(sorted({name.rsplit(".", 2)[0] for name in tensors if "backbone" not in name})[:4])
        raise ValueError(
            f"convert: {where} must be a RetinaNet, Faster R-CNN or Mask R-CNN with fully connected box head, got "
            f"{found or 'a backbone alone'}"
        )
    return "retinanet" if has(dense) else "mask_rcnn" if has(masks) else "faster_rcnn"


def _require_pyramid(tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
    if not any(name.startswith(prefix) for name in tensors):
        raise ValueError(f"convert: {where} must have a feature pyramid, got none ({prefix}...); take an FPN model")


def _fpn_rules(first: int) -> tuple[tuple[str, str], ...]:
    """Renaming rules of the lateral and output convolutions of C2 (or C3) .. C5."""
    parts = (("lateral", "inner"), ("output", "layer"))
    return tuple(
        (rf"backbone\.fpn_{theirs}{stage}\.(.+)", rf"neck.{ours}_blocks.{stage - first}.0.\1")
        for theirs, ours in parts
        for stage in range(first, 6)
    )


def _renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights under our names; names without a rule are kept."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    named = {}
    for name, value in tensors.items():
        if _NO_WEIGHTS.fullmatch(name):
            continue
        found = next((match.expand(to) for rule, to in compiled if (match := rule.fullmatch(name))), name)
        named[found] = value
    return named


def _tensor(named: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in named or not named[name].ndim:
        raise ValueError(f"convert: {where} must hold {name}, got none; it is incomplete")
    return named[name]


def _columns(named: Mapping[str, Tensor], name: str) -> int:
    return named[name].shape[1] if name in named and named[name].ndim > 1 else 0


def _backbone(named: Mapping[str, Tensor], where: str) -> str:
    blocks = {int(m[1]) for name in named if (m := re.match(r"backbone\.layer3\.(\d+)\.conv3\.", name))}
    if len(blocks) not in _DEPTHS:
        raise ValueError(
            f"convert: {where} must have a ResNet-50 or -101, got a third stage of {len(blocks)} bottlenecks"
        )
    return _DEPTHS[len(blocks)]


def _classes_of_detectron2(named: Mapping[str, Tensor], dense: bool, where: str) -> int:
    if dense:
        return _tensor(named, "head.classification_head.cls_logits.bias", where).shape[0] // 9
    return _tensor(named, "head.roi_heads.box_predictor.cls_score.bias", where).shape[0] - 1


def _class_names(given: Sequence[str] | None, count: int, where: str) -> list[str]:
    if given is None and count != len(COCO_CLASSES):
        raise ValueError(
            f"convert: class names must be given for {where}, whose {count} classes are not COCO's; pass --annotations"
        )
    names = list(COCO_CLASSES.values()) if given is None else [str(name) for name in given]
    if len(names) != count or not names:
        raise ValueError(f"convert: class names must be the {count} of {where}, got {len(names)}")
    return names


def _check_pixels(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise if the file records another image normalisation."""
    for name, wanted in (("pixel_mean", _BGR_MEAN), ("pixel_std", (1.0, 1.0, 1.0))):
        found = tensors.get(name)
        if found is None:
            continue
        values = found.flatten().tolist()
        if len(values) != 3 or any(abs(value - other) > 0.01 for value, other in zip(values, wanted)):
            raise ValueError(
                f"convert: {name} of {where} must be {wanted} (BGR, as of the zoo's ResNets), got "
                f"{values}; models with another input cannot be converted"
            )


def _permute_anchors(named: dict[str, Tensor], layer: str, values: int) -> None:
    """Reorder the nine anchors of a cell from scale-major to ratio-major order; `values` channels each."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        value = named.get(name)
        if value is not None and value.shape[:1] == (9 * values,):
            named[name] = value.unflatten(0, (3, 3, values)).transpose(0, 1).flatten(0, 2).contiguous()


def _move_background(named: dict[str, Tensor], classes: int) -> None:
    """Move the background from last to first; boxes and masks get an unused background entry."""
    for end in ("weight", "bias"):
        for layer, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
            name = f"head.roi_heads.{layer}.{end}"
            if name in named and named[name].shape[:1] == (rows * classes,):
                named[name] = torch.cat([named[name].new_zeros(rows, *named[name].shape[1:]), named[name]])
        name = f"head.roi_heads.box_predictor.cls_score.{end}"
        if name in named and named[name].ndim:
            named[name] = named[name].roll(1, 0)


def _select_classes(named: dict[str, Tensor], layers: Mapping[str, int], rows: int, kept: list[int]) -> None:
    """Keep only the classes `kept` of `rows` in layers with output channels [any, rows, values]."""
    for layer, values in layers.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            value = named.get(name)
            if value is not None and value.ndim and value.shape[0] % (rows * values) == 0:
                named[name] = value.unflatten(0, (-1, rows, values))[:, kept].flatten(0, 2).contiguous()


def _change_eps(named: dict[str, Tensor], eps: float) -> None:
    """Rescale weights so that weight * rsqrt(variance + 1e-5) equals the original with `eps`."""
    for name in [name for name in named if name.startswith("backbone.") and name.endswith(".running_var")]:
        weight = name.removesuffix("running_var") + "weight"
        if weight in named and named[weight].shape == named[name].shape:
            variance = named[name].double()
            named[weight] = (named[weight].double() * ((variance + 1e-5) / (variance + eps)).sqrt()).float()


def _finish(
    config: DetectorConfig,
    named: Mapping[str, Tensor],
    names: list[str],
    origin: str,
    notes: tuple[str, ...],
    where: str,
) -> Conversion:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = build_detector(config).state_dict()
    pairs, report = match_tensors(wanted, named)
    if not report.complete or report.unexpected:
        raise ValueError(
            f"convert: {where} must be what {origin} builds as {config.detector} with {config.backbone}, but: {report}"
        )
    check_finite("convert", where, {name: named[name] for name in pairs})
    with torch.random.fork_rng(devices=[]):
        detector = build_detector(config)
    copy_tensors(detector.state_dict(), named, pairs)
    return Conversion(detector.eval(), names, origin, report, notes)
