"""The configuration of a detector: one frozen dataclass for all kinds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fastkd.codec import decode, encode, require

DETECTORS = ("retinanet", "fcos", "atss", "poto", "condinst", "solov2", "faster_rcnn", "mask_rcnn")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "swin_t", "mobilenet_v2")
DEFORMABLE = ("resnet50", "resnet101", "resnext101_32x8d")
TIMM = "timm:"
NORMS = ("frozen_bn", "bn", "gn")
HEAD_NORMS = ("none", "gn")
P6_SOURCES = ("p5", "c5")
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
WITH_MASKS = ("mask_rcnn", "condinst", "solov2")
WITHOUT_ANCHORS = ("fcos", "atss", "poto", "condinst", "solov2")

CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # module:Class

_TIMM_NAME = re.compile(  # no URLs or paths: loading a detector file must not load other files
    r"timm:[a-z0-9_]+(\.[a-z0-9_]+)?"
)

_POSITIVE_INTEGERS = (
    "num_classes",
    "channels",
    "head_convs",
    "detections_per_image",
    "candidates_per_level",
    "rpn_pre_nms_train",
    "rpn_pre_nms_test",
    "rpn_post_nms_train",
    "rpn_post_nms_test",
    "rpn_samples",
    "roi_samples",
    "roi_canonical_size",
    "box_head_channels",
    "mask_head_channels",
    "mask_branch_channels",
    "mask_samples",
    "instance_head_channels",
    "kernel_channels",
)


@dataclass(frozen=True)
class DetectorConfig:
    """A detector: its kind, its size, its anchors and its thresholds.

    Defaults are torchvision's, or the papers' where torchvision has no such detector.

    Args:
        detector: "retinanet", "fcos", "atss", "poto", "condinst", "solov2", "faster_rcnn" or "mask_rcnn".
        num_classes: object classes, without background, >= 1.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "swin_t", "mobilenet_v2", or
            "timm:NAME" for a timm model (pip install 'fastkd[timm]') with maps of strides 4 .. 32.
        deformable: modulated deformable 3x3 convolutions (DCNv2) in the stages of strides 8 .. 32 of resnet50,
            resnet101 and resnext101_32x8d.
        width: scales every width of the backbone (0.5: 32 .. 256 instead of 64 .. 512), rounded to multiples of 8
            (Swin: of 24); 1 for timm's.
        channels: channels of every pyramid level and of the dense heads.
        norm: normalisation in ResNets and MobileNetV2: "frozen_bn" (statistics and affine fixed), "bn", or "gn" (32
            groups, or fewer with two channels each). Not used by Swin and timm models.
        frozen_stages: stages of the backbone that never train: 0 none, 1 the stem, 2 also the stage of stride 4 (layer1
            of a ResNet), .. 5 all; must be 0 for timm models.
        stride_in_1x1: a stage's first bottleneck halves the map in its first 1x1 convolution, as in the original ResNet
            and detectron2's models, instead of in the 3x3 (torchvision).
        p6_source: input of P6 in a dense detector: "p5", or "c5", the backbone's last map (detectron2).
        anchor_base: side of a level's smallest square anchor divided by the level's stride. None: 4 for RetinaNet, 8
            for two-stage detectors. FCOS and CondInst have no anchors: a location is positive on a level if the
            farthest side of the box is anchor_base / 2 to anchor_base strides away (None: 8). ATSS compares boxes with
            squares of anchor_base strides around the locations (None: 8). SOLOv2 assigns to a level the instances
            whose box has an area of (anchor_base / 2)^2 to (2 * anchor_base)^2 square strides (None: 12).
        anchor_scales: factors on anchor_base, one anchor size each. None: 1, 2^(1/3), 2^(2/3) for RetinaNet, 1 for
            two-stage.
        anchor_ratios: height / width of the anchors. None: 0.5, 1, 2.
        anchor_rounding: round the corners of anchors to whole pixels (torchvision); False: exact (detectron2).
        head_convs: convolutions in each tower of a dense head.
        head_norm: "none": the published head. "gn": GroupNorm in RetinaNet's towers (groups of 8 channels, as in
            torchvision's version 2 at 256 channels; trains a narrow head several times faster), and in CondInst's mask
            branch instead of batch norm. The other heads always have their published norms.
        score_threshold: detections at or below this score are dropped. SOLOv2's candidates must exceed twice this
            value before matrix NMS.
        nms_threshold: IoU above which the weaker of two detections of a class is dropped. None: 0.6 for ATSS and
            CondInst, no suppression for POTO, 0.5 otherwise. Must be None for SOLOv2, which has matrix NMS.
        detections_per_image: maximum number of detections of one image.
        candidates_per_level: one-stage detectors: maximum number of detections per level before NMS.
        rpn_pre_nms_train, rpn_pre_nms_test: proposals of one level and image that enter non-maximum suppression.
        rpn_post_nms_train, rpn_post_nms_test: proposals of one image kept after it.
        rpn_samples: anchors of one image in the proposal loss, at most half of them positive.
        roi_samples: proposals of one image in the box loss.
        roi_positive_fraction: maximum fraction of positives among roi_samples.
        roi_canonical_size: side in pixels of proposals pooled from P4 (half that size: P3, and so on).
        roi_aligned: pool with cell centres at half pixels and one sample per cell of a bin (detectron2), instead of
            torchvision's 2 x 2 samples of unshifted boxes.
        box_head_channels: width of the two fully connected layers on pooled boxes.
        mask_head_channels: width of the four convolutions on pooled masks.
        mask_branch_channels: width of the convolutions that compute the mask features of CondInst and SOLOv2.
        mask_samples: CondInst: maximum number of locations per process in the mask loss.
        instance_head_channels: SOLOv2: width of the towers.
        kernel_channels: SOLOv2: channels of the mask features and of the kernels applied to them.
        grids: SOLOv2: cells along a side of each level's grid.
        custom: a detector of one's own, "module:Class", built as Class(config) in the place of `detector`, whose
            defaults (strides, masks) hold for it; set by --detector module:Class (see fastkd/detectors/own.py).
    """

    detector: str = "retinanet"
    num_classes: int = 80
    backbone: str = "resnet50"
    deformable: bool = False
    width: float = 1.0
    channels: int = 256
    norm: str = "frozen_bn"
    frozen_stages: int = 0
    stride_in_1x1: bool = False
    p6_source: str = "p5"
    anchor_base: float | None = None
    anchor_scales: tuple[float, ...] | None = None
    anchor_ratios: tuple[float, ...] | None = None
    anchor_rounding: bool = True
    head_convs: int = 4
    head_norm: str = "none"
    score_threshold: float = 0.05
    nms_threshold: float | None = None
    detections_per_image: int = 100
    candidates_per_level: int = 1000
    rpn_pre_nms_train: int = 2000
    rpn_pre_nms_test: int = 1000
    rpn_post_nms_train: int = 2000
    rpn_post_nms_test: int = 1000
    rpn_samples: int = 256
    roi_samples: int = 512
    roi_positive_fraction: float = 0.25
    roi_canonical_size: int = 224
    roi_aligned: bool = False
    box_head_channels: int = 1024
    mask_head_channels: int = 256
    mask_branch_channels: int = 128
    mask_samples: int = 500
    instance_head_channels: int = 512
    kernel_channels: int = 256
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)
    custom: str | None = None

    def __post_init__(self) -> None:
        named = (("detector", DETECTORS), ("norm", NORMS), ("head_norm", HEAD_NORMS), ("p6_source", P6_SOURCES))
        for name, choices in named:
            _check(getattr(self, name) in choices, name, "one of " + ", ".join(choices), getattr(self, name))
        self._check_backbone()
        for name in _POSITIVE_INTEGERS:
            _check(_is_integer(getattr(self, name), 1), name, "an integer >= 1", getattr(self, name))
        _check(
            _is_integer(self.frozen_stages, 0) and self.frozen_stages <= 5,
            "frozen_stages",
            "0 .. 5",
            self.frozen_stages,
        )
        _check(_is_number(self.width) and 0 < self.width <= 8, "width", "a number in (0, 8]", self.width)
        for name in ("score_threshold", "nms_threshold", "roi_positive_fraction"):
            value = getattr(self, name)
            if value is not None or name != "nms_threshold":
                _check(_is_number(value) and 0 <= value <= 1, name, "a number in [0, 1]", value)
        if self.anchor_base is not None:
            _check(
                _is_number(self.anchor_base) and self.anchor_base > 0,
                "anchor_base",
                "positive or None",
                self.anchor_base,
            )
        for name in ("anchor_scales", "anchor_ratios"):
            self._check_factors(name)
        for name in ("stride_in_1x1", "anchor_rounding", "roi_aligned"):
            _check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        bottlenecks = self.backbone in ("resnet50", "resnet101")
        _check(bottlenecks or not self.stride_in_1x1, "stride_in_1x1", f"False for {self.backbone}", self.stride_in_1x1)
        if self.fine:
            _check(self.p6_source == "p5", "p6_source", f'"p5" for {self.detector}', self.p6_source)
        if self.head_norm == "gn":
            _check(self.channels % 8 == 0, "channels", 'a multiple of 8 with head_norm "gn"', self.channels)
        if self.detector in WITHOUT_ANCHORS:
            wanted = f"None for {self.detector}, which has no anchors"
            for name in ("anchor_scales", "anchor_ratios"):
                _check(getattr(self, name) is None, name, wanted, getattr(self, name))
        if self.detector == "solov2":
            wanted = "None for solov2, which has matrix NMS"
            _check(self.nms_threshold is None, "nms_threshold", wanted, self.nms_threshold)
        good = isinstance(self.grids, (tuple, list)) and len(self.grids) == len(self.strides)
        _check(good and all(_is_integer(v, 1) for v in self.grids), "grids", "five integers >= 1", self.grids)
        object.__setattr__(self, "grids", tuple(self.grids))
        known = self.custom is None or (isinstance(self.custom, str) and CLASS_NAME.fullmatch(self.custom) is not None)
        _check(known, "custom", "None or module:Class", self.custom)

    def _check_backbone(self) -> None:
        known = isinstance(self.backbone, str) and (self.backbone in BACKBONES or _TIMM_NAME.fullmatch(self.backbone))
        wanted = "one of " + ", ".join(BACKBONES) + " or timm:NAME"
        _check(bool(known), "backbone", wanted, self.backbone)
        _check(isinstance(self.deformable, bool), "deformable", "True or False", self.deformable)
        if self.deformable:
            wanted = f"False for {self.backbone}; only {', '.join(DEFORMABLE)} have a deformable form"
            _check(self.backbone in DEFORMABLE, "deformable", wanted, self.deformable)
        if self.backbone.startswith(TIMM):
            _check(self.width == 1, "width", "1 for a timm backbone", self.width)
            _check(self.frozen_stages == 0, "frozen_stages", "0 for a timm backbone", self.frozen_stages)

    def _check_factors(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        good = isinstance(value, (tuple, list)) and len(value) > 0 and all(_is_number(v) and v > 0 for v in value)
        _check(good, name, "None or a non-empty tuple of positive numbers", value)
        object.__setattr__(self, name, tuple(value))

    @property
    def kind(self) -> str:
        """Its name in messages: "module:Class" of a detector of one's own, or `detector`."""
        return self.custom or self.detector

    @property
    def two_stage(self) -> bool:
        """Whether the detector has a region proposal stage."""
        return self.detector in TWO_STAGE

    @property
    def with_masks(self) -> bool:
        """Whether the detector learns and predicts instance masks."""
        return self.detector in WITH_MASKS

    @property
    def cells_have_boxes(self) -> bool:
        """Whether pyramid cells have scores and boxes; False for SOLOv2."""
        return self.detector != "solov2"

    @property
    def fine(self) -> bool:
        """Whether the pyramid is P2 .. P6 instead of P3 .. P7."""
        return self.two_stage or self.detector == "solov2"

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one cell to the next, level by level."""
        return (4, 8, 16, 32, 64) if self.fine else (8, 16, 32, 64, 128)

    @property
    def nms(self) -> float | None:
        """IoU above which the weaker of two detections is dropped; None: no suppression."""
        if self.nms_threshold is not None:
            return self.nms_threshold
        return {"atss": 0.6, "condinst": 0.6, "poto": None, "solov2": None}.get(self.detector, 0.5)

    def anchor_sizes(self) -> list[tuple[float, ...]]:
        """Sides in pixels of the square anchors, level by level; rounded down, as torchvision does, or exact."""
        base, scales = self.anchor_base, self.anchor_scales
        if base is None:
            base = 4 if self.detector == "retinanet" else 8
        if scales is None:
            scales = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)) if self.detector == "retinanet" else (1.0,)
        sizes = [tuple(base * stride * scale for scale in scales) for stride in self.strides]
        return [tuple(max(1, int(size)) for size in level) for level in sizes] if self.anchor_rounding else sizes

    def aspect_ratios(self) -> tuple[float, ...]:
        """Height / width of the anchors."""
        if self.detector in WITHOUT_ANCHORS:
            return (1.0,)
        return self.anchor_ratios if self.anchor_ratios is not None else (0.5, 1.0, 2.0)

    def to_dict(self) -> dict:
        """The fields as JSON values."""
        return encode(self, {})

    @classmethod
    def from_dict(cls, values: dict) -> DetectorConfig:
        """The inverse of `to_dict`; missing fields, as in files of earlier versions, take their defaults.

        Raises: ValueError for an unknown field or an invalid value.
        """
        require(isinstance(values, dict), "DetectorConfig", "an object", values)
        return decode(cls, cls().to_dict() | values, "DetectorConfig", {})


def _is_integer(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(good: bool, name: str, wanted: str, value: object) -> None:
    require(good, f"DetectorConfig: {name}", wanted, value)
