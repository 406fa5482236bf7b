"""Recipes for the other rows of the papers' COCO tables, and the AP reported there.

    coco-<detector>-<backbone>-<schedule>[-ss]-{baseline,lgd}   LGD's tables; -ss is single-scale, others use 6 scales
    coco-<detector>-mbv2-{baseline,icd}                         ICD's students on MobileNetV2

Rows with a ResNet-50 and the schedule of ICD or LGD are the plain recipes coco-<detector>-<method>.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from fastkd.training.config import OptimizerConfig, Recipe, Schedule

SCHEDULES = {  # steps at 16 images, milestones
    "1x": (90_000, (60 / 90, 80 / 90)),
    "2x": (180_000, (120 / 180, 160 / 180)),
    "3x": (270_000, (210 / 270, 250 / 270)),
}
BACKBONES = {  # name in torchvision, whether its convolutions are deformable
    "r50": ("resnet50", False),
    "r101": ("resnet101", False),
    "r101-dcn": ("resnet101", True),
    "x101-dcn": ("resnext101_32x8d", True),
    "swin-t": ("swin_t", False),
    "mbv2": ("mobilenet_v2", False),
}
LGD_DETECTORS, LGD_BACKBONES = ("retinanet", "fcos", "faster-rcnn"), ("r50", "r101", "r101-dcn", "x101-dcn")
ICD_DETECTORS = ("retinanet", "faster-rcnn", "fcos", "mask-rcnn", "atss", "condinst", "solov2")
SINGLE_SCALE = (800,)


@dataclass(frozen=True)
class Row:
    """A row's differences from the plain recipe of its detector and method.

    Args:
        detector: name of the detector in recipe names.
        method: name of the method in recipe names.
        backbone: a key of BACKBONES.
        schedule: "1x", "2x" or "3x".
        single_scale: train with a short side of 800 pixels only.
    """

    detector: str
    method: str
    backbone: str
    schedule: str
    single_scale: bool = False


def _rows() -> dict[str, Row]:
    rows = {}
    scales = ((False, ""), (True, "-ss"))
    for detector, backbone, (single, suffix) in itertools.product(LGD_DETECTORS, LGD_BACKBONES, scales):
        for method in ("baseline", "lgd"):
            name = f"coco-{detector}-{backbone}-2x{suffix}-{method}"
            rows[name] = Row(detector, method, backbone, "2x", single)
        if backbone == "r50" and not single:
            del rows[name]  # the same as coco-<detector>-lgd
    for detector in ("atss", "poto"):
        rows[f"coco-{detector}-r50-2x-baseline"] = Row(detector, "baseline", "r50", "2x")
    for detector, method in itertools.product(("retinanet", "mask-rcnn"), ("baseline", "lgd")):
        rows[f"coco-{detector}-swin-t-3x-{method}"] = Row(detector, method, "swin-t", "3x")
    for detector, method in itertools.product(ICD_DETECTORS, ("baseline", "icd")):
        rows[f"coco-{detector}-mbv2-{method}"] = Row(detector, method, "mbv2", "1x")
    return rows


ROWS = _rows()

# Box AP on COCO val (CrowdHuman: difference to the baseline) as printed in the papers, not measured with fastkd.
PUBLISHED = {
    "coco-retinanet-baseline": "37.4",
    "coco-retinanet-icd": "40.7",
    "coco-faster-rcnn-baseline": "37.9",
    "coco-faster-rcnn-icd": "40.9",
    "coco-fcos-baseline": "39.4",
    "coco-fcos-icd": "42.9",
    "coco-mask-rcnn-baseline": "38.6, mask 35.2",
    "coco-mask-rcnn-icd": "41.2, mask 37.4",
    "coco-condinst-baseline": "39.7",
    "coco-condinst-icd": "43.7",
    "coco-solov2-baseline": "mask 34.6",
    "coco-solov2-icd": "mask 38.5",
    "coco-atss-baseline": "39.6",
    "coco-atss-icd": "43.0",
    "coco-retinanet-lgd": "40.4",
    "coco-retinanet-r101-2x-lgd": "42.1",
    "coco-retinanet-r101-dcn-2x-lgd": "44.5",
    "coco-retinanet-x101-dcn-2x-lgd": "45.9",
    "coco-retinanet-swin-t-3x-lgd": "45.9",
    "coco-retinanet-r50-2x-ss-baseline": "36.2",
    "coco-retinanet-r50-2x-ss-lgd": "39.0",
    "coco-fcos-lgd": "42.4",
    "coco-fcos-r101-2x-lgd": "44.0",
    "coco-fcos-r101-dcn-2x-lgd": "46.3",
    "coco-fcos-x101-dcn-2x-baseline": "46.1",
    "coco-fcos-x101-dcn-2x-lgd": "47.9",
    "coco-faster-rcnn-lgd": "40.5",
    "coco-faster-rcnn-r101-2x-lgd": "42.2",
    "coco-faster-rcnn-r101-dcn-2x-lgd": "44.8",
    "coco-faster-rcnn-x101-dcn-2x-lgd": "46.2",
    "coco-mask-rcnn-swin-t-3x-lgd": "46.4, mask 42.5",
    "crowdhuman-faster-rcnn-lgd": "MR^-2 2.3 lower",
}


def published_ap(name: str) -> str:
    """The AP a paper reports for the recipe; "-" if there is none."""
    return PUBLISHED.get(name, "-")


def apply_row(recipe: Recipe, row: Row) -> Recipe:
    """The plain recipe of the row's detector and method, with the row's backbone, schedule and scales.

    Swin trains with AdamW at 1e-4, weight decay 0.05 and no frozen stages, as in Swin's detection recipes.
    """
    backbone, deformable = BACKBONES[row.backbone]
    steps, milestones = SCHEDULES[row.schedule]
    optimizer = dataclasses.replace(recipe.optimizer, milestones=milestones, warmup=1000 / steps)
    detector = dataclasses.replace(recipe.detector, backbone=backbone, deformable=deformable)
    data = recipe.data
    if backbone == "swin_t":
        optimizer = OptimizerConfig(
            kind="adamw", learning_rate=1e-4, weight_decay=0.05, milestones=milestones, warmup=1000 / steps
        )
        detector = dataclasses.replace(detector, frozen_stages=0)
    if row.single_scale:
        data = dataclasses.replace(data, short_sides=SINGLE_SCALE)
    return dataclasses.replace(
        recipe,
        detector=detector,
        data=data,
        method=recipe.method and recipe.method.published(detector).method,
        backbone_weights=f"weights/{backbone}.pth",
        optimizer=optimizer,
        schedule=Schedule(steps=steps, batch_size=16),
    )
