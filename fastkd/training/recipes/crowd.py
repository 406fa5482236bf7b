"""Recipes on people in crowds: the generated set and CrowdHuman, Faster R-CNN alone and with LGD.

crowd-faster-rcnn-{baseline,lgd}         on `fastkd data crowd`, for two CPU cores
crowdhuman-faster-rcnn-{baseline,lgd}    R50 on CrowdHuman, 30 epochs (LGD's paper: mMR 2.3 better)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastkd.detectors import DetectorConfig
from fastkd.training.config import DataConfig, OptimizerConfig, Recipe, RuntimeConfig, Schedule
from fastkd.training.methods import LGDConfig, Method


@dataclass(frozen=True)
class CrowdNumbers:
    """Hyper-parameters of the recipes on generated crowds, the same for all students.

    People are upright, 20 .. 88 pixels high, and a quarter of them are half hidden. Methods use the settings of the
    scenes recipes.
    """

    steps: int = 500
    batch_size: int = 16
    rate: float = 1.5e-3
    clip_norm: float = 2.0
    weight_decay: float = 0.05
    warmup: float = 0.1
    anchor_base: float = 3.0
    anchor_ratios: tuple[float, ...] = (1.2, 2.4)


CROWD = CrowdNumbers()


def _files() -> dict[str, Any]:
    """The folder layout of CrowdHuman's download."""
    return {
        "format": "crowdhuman",
        "train_annotations": "annotation_train.odgt",
        "train_images": "Images",
        "val_annotations": "annotation_val.odgt",
        "val_images": "Images",
    }


def _generated(name: str, method: type[Method] | None) -> Recipe:
    detector = DetectorConfig(
        detector="faster_rcnn",
        num_classes=1,
        backbone="resnet18",
        width=0.25,
        channels=64,
        anchor_base=CROWD.anchor_base,
        anchor_ratios=CROWD.anchor_ratios,
        score_threshold=0.01,
        detections_per_image=500,
        rpn_pre_nms_train=200,
        rpn_pre_nms_test=500,
        rpn_post_nms_train=120,
        rpn_post_nms_test=500,
        rpn_samples=64,
        roi_samples=64,
        roi_canonical_size=64,
        box_head_channels=256,
    )
    setup = method.on_scenes(detector) if method else None
    return Recipe(
        name=name,
        detector=detector,
        data=DataConfig(root="data/crowd", **_files()),
        method=setup.method if setup else None,
        backbone_weights="asset:scenes-resnet18-backbone.safetensors",
        optimizer=OptimizerConfig(
            kind="adamw",
            learning_rate=CROWD.rate,
            clip_norm=CROWD.clip_norm,
            weight_decay=CROWD.weight_decay,
            decay="cosine",
            warmup=CROWD.warmup,
        ),
        method_optimizer=setup.optimizer if setup else None,
        schedule=Schedule(steps=CROWD.steps, batch_size=CROWD.batch_size),
    )


def _crowdhuman(name: str, method: type[Method] | None) -> Recipe:
    """The usual settings on CrowdHuman: tall anchors, 800 x 1400 pixels, low score threshold, 500 detections."""
    epochs, images, batch_size = 30, 15_000, 16
    steps = epochs * images // batch_size
    detector = DetectorConfig(
        detector="faster_rcnn",
        num_classes=1,
        backbone="resnet50",
        norm="frozen_bn",
        frozen_stages=2,
        anchor_ratios=(1.0, 2.0, 3.0),
        score_threshold=0.01,
        detections_per_image=500,
    )
    setup = method.published(detector) if method else None
    return Recipe(
        name=name,
        detector=detector,
        data=DataConfig(
            root="data/crowdhuman", short_sides=(800,), val_short_side=800, max_side=1400, workers=4, **_files()
        ),
        method=setup.method if setup else None,
        backbone_weights="weights/resnet50.pth",
        optimizer=OptimizerConfig(learning_rate=0.02, milestones=(24 / epochs, 27 / epochs), warmup=1000 / steps),
        method_optimizer=setup.optimizer if setup else None,
        schedule=Schedule(steps=steps, batch_size=batch_size),
        runtime=RuntimeConfig(log_every=50, checkpoint_every=5000),
    )


# recipe name -> function that builds it
CROWD_RECIPES: dict[str, Callable[[str], Recipe]] = {
    f"{family}-faster-rcnn-{'baseline' if method is None else method.kind}": functools.partial(make, method=method)
    for family, make in (("crowd", _generated), ("crowdhuman", _crowdhuman))
    for method in (None, LGDConfig)
}
