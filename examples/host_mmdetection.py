"""mmengine's Runner with distillation by one hook: python examples/host_mmdetection.py [DATA] [STEPS] [METHOD]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mmengine.hub import get_config
from mmengine.runner import Runner
from scenes import CLASSES, Scenes

from fastkd.integrations.mmdetection import attach


def runner_of(depth: int, data: str, steps: int) -> Runner:
    """mmdetection's RetinaNet with random weights on a ResNet of this depth, trained on the generated pictures."""
    config = get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    config.model.backbone.depth, config.model.backbone.frozen_stages = depth, -1
    config.model.backbone.init_cfg, config.model.backbone.norm_eval = None, False
    config.model.bbox_head.num_classes = CLASSES
    categories = json.loads(Path(data, "annotations", "train.json").read_text())["categories"]
    dataset = {"type": "CocoDataset", "data_root": data, "ann_file": "annotations/train.json",
               "data_prefix": {"img": "train/"}, "metainfo": {"classes": tuple(each["name"] for each in categories)},
               "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True},
                            {"type": "PackDetInputs"}]}  # fmt: skip
    config.train_dataloader = {"batch_size": 4, "num_workers": 0, "dataset": dataset,
                               "sampler": {"type": "InfiniteSampler", "shuffle": True}}  # fmt: skip
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps}
    config.optim_wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-4}}
    config.param_scheduler, config.work_dir = [], f"{data}/runs/depth{depth}"
    for name in ("val", "test"):
        config[f"{name}_cfg"] = config[f"{name}_dataloader"] = config[f"{name}_evaluator"] = None
    return Runner.from_cfg(config)


def main(data: str = "scenes", steps: int = 20, method: str = "icd") -> None:
    torch.manual_seed(0)
    Scenes(data)
    teacher = runner_of(34, data, steps)
    teacher.train()
    runner = runner_of(18, data, steps)
    teacher = None if method == "lgd" else teacher.model.eval()
    kd = attach(runner.model, method, teacher=teacher, num_classes=CLASSES)
    runner.register_hook(kd.callback)
    runner.train()
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
