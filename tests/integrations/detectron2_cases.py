"""A detector and a trainer with detectron2's order of calls, argument and attribute names, and inputs for them."""

import sys
import types
import weakref

import torch
from torch import nn
from torchvision_cases import CLASSES, fpn

SIZE = (64, 96)


class Backbone(nn.Module):
    size_divisibility = 32
    padding_constraints: dict = {}  # noqa: RUF012

    def __init__(self, channels):
        super().__init__()
        self.inner = fpn(dense=True, channels=channels)

    def forward(self, images):
        return {f"p{3 + level}": value for level, value in enumerate(self.inner(images).values())}


class Head(nn.Module):
    """Logits of each level, and no box deltas."""

    def __init__(self, channels, classes):
        super().__init__()
        self.norm, self.cls_score = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)

    def forward(self, levels):
        return [self.cls_score(self.norm(level)) for level in levels], []


class MetaArchitecture(nn.Module):
    def __init__(self, channels=16, classes=CLASSES):
        super().__init__()
        self.backbone, self.head = Backbone(channels), Head(channels, classes)
        self.num_classes, self.loss_normalizer = classes, 100.0
        self.register_buffer("pixel_mean", torch.tensor([103.5, 116.3, 123.7])[:, None, None], False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 57.0), False)

    def preprocess_image(self, inputs):
        images = [(entry["image"] - self.pixel_mean) / self.pixel_std for entry in inputs]
        rows, columns = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
        padded = torch.zeros(len(images), 3, rows, columns)
        for target, image in zip(padded, images):
            target[:, : image.shape[1], : image.shape[2]] = image
        assert self.backbone.size_divisibility == 32
        return padded

    def forward(self, inputs):
        features = self.backbone(self.preprocess_image(inputs))
        scores, _ = self.head(list(features.values()))
        if not self.training:
            return scores
        count = sum(len(entry["instances"].gt_boxes.tensor) for entry in inputs)
        self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * max(count, 1)
        loss = sum(score.square().sum() for score in scores) / self.loss_normalizer
        sys.modules["detectron2.utils.events"].EventStorage.current[-1].put_scalars(num_pos=count)
        return {"loss_cls": loss}


def inputs(seed=0):
    entries = []
    for index, (height, width) in enumerate((SIZE, (48, 64))):
        generator = torch.Generator().manual_seed(2 * seed + index)
        boxes = torch.tensor([[4.0, 4, 30, 40], [10, 8, 60, 44]])[: index + 1]
        instances = types.SimpleNamespace(
            gt_boxes=types.SimpleNamespace(tensor=boxes), gt_classes=torch.arange(index + 1)
        )
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        entries.append({"image": image, "instances": instances})
    return entries


KEYS = {  # those of detectron2's default configuration that the example sets
    "": ("OUTPUT_DIR",), "MODEL": ("META_ARCHITECTURE", "DEVICE", "WEIGHTS"), "BACKBONE": ("NAME", "FREEZE_AT"),
    "RESNETS": ("DEPTH", "RES2_OUT_CHANNELS", "NORM", "OUT_FEATURES"), "FPN": ("IN_FEATURES",),
    "RETINANET": ("NUM_CLASSES",), "ANCHOR_GENERATOR": ("SIZES",), "DATASETS": ("TRAIN", "TEST"),
    "INPUT": ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN"), "DATALOADER": ("NUM_WORKERS",),
    "SOLVER": ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER"),
}  # fmt: skip


class Node:
    """A part of a configuration, which refuses unknown keys."""

    def __init__(self, name, **parts):
        vars(self).update(dict.fromkeys(KEYS[name]), **parts)

    def __setattr__(self, name, value):
        assert name in vars(self), name
        vars(self)[name] = value


def get_cfg():
    """The default configuration."""
    parts = {name: Node(name) for name in KEYS if name not in ("", "MODEL")}
    of_model = [parts.pop(name) for name in ("BACKBONE", "RESNETS", "FPN", "RETINANET", "ANCHOR_GENERATOR")]
    return Node("", MODEL=Node("MODEL", **dict(zip(list(KEYS)[2:7], of_model))), **parts)


class DefaultTrainer:
    """The loop of `TrainerBase.train` and `SimpleTrainer.run_step`; models of depth 34 are wider."""

    def __init__(self, config):
        channels = 24 if config.MODEL.RESNETS.DEPTH == 34 else 16
        self.model = MetaArchitecture(channels, config.MODEL.RETINANET.NUM_CLASSES).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), config.SOLVER.BASE_LR)
        self.max_iter, self.hooks = config.SOLVER.MAX_ITER, []

    def register_hooks(self, hooks):
        for hook in hooks:
            assert isinstance(hook, sys.modules["detectron2.engine"].HookBase)
            hook.trainer = weakref.proxy(self)
        self.hooks += hooks

    def train(self):
        with sys.modules["detectron2.utils.events"].EventStorage(0) as self.storage:
            for hook in self.hooks:
                hook.before_train()
            for step in range(self.max_iter):
                self.iter = step
                losses = sum(self.model(inputs(step)).values())
                self.optimizer.zero_grad()
                losses.backward()
                self.optimizer.step()
                for hook in self.hooks:
                    hook.after_step()


MODULES = {
    "detectron2.config": {"get_cfg": get_cfg},
    "detectron2.data.datasets": {"register_coco_instances": lambda name, metadata, file, images: None},
}
