"""detectron2's trainer with distillation by one hook: python examples/host_detectron2.py [DATA] [STEPS] [METHOD]"""

from __future__ import annotations

import sys

import torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from scenes import CLASSES, Scenes

from fastkd.integrations.detectron2 import attach


def configuration(depth: int, data: str, steps: int):
    """A RetinaNet of random weights on a ResNet of this depth, trained on the generated pictures."""
    config = get_cfg()
    config.MODEL.META_ARCHITECTURE, config.MODEL.DEVICE, config.MODEL.WEIGHTS = "RetinaNet", "cpu", ""
    config.MODEL.BACKBONE.NAME, config.MODEL.BACKBONE.FREEZE_AT = "build_retinanet_resnet_fpn_backbone", 0
    config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS, config.MODEL.RESNETS.NORM = depth, 64, "BN"
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    config.MODEL.RETINANET.NUM_CLASSES = CLASSES
    config.MODEL.ANCHOR_GENERATOR.SIZES = [[side] for side in (24, 48, 96, 192, 384)]
    config.DATASETS.TRAIN, config.DATASETS.TEST = ("scenes_train",), ()
    config.INPUT.MIN_SIZE_TRAIN, config.INPUT.MAX_SIZE_TRAIN = (128,), 128
    config.DATALOADER.NUM_WORKERS = 0
    config.SOLVER.IMS_PER_BATCH, config.SOLVER.BASE_LR, config.SOLVER.MAX_ITER = 4, 0.001, steps
    config.OUTPUT_DIR = data
    return config


def main(data: str = "scenes", steps: int = 20, method: str = "icd") -> None:
    torch.manual_seed(0)
    Scenes(data)
    register_coco_instances("scenes_train", {}, f"{data}/annotations/train.json", f"{data}/train")
    teacher = DefaultTrainer(configuration(34, data, steps))
    teacher.train()
    trainer = DefaultTrainer(configuration(18, data, steps))
    teacher = None if method == "lgd" else teacher.model.eval()
    kd = attach(trainer.model, method, teacher=teacher, num_classes=CLASSES)
    trainer.register_hooks([kd.callback])
    trainer.train()
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
