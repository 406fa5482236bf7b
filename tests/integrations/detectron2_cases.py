"""Detectors and a trainer with detectron2's order of calls, argument and attribute names, and inputs for them."""

import sys
import types
import weakref

import torch
from torch import nn
from torchvision.ops import MultiScaleRoIAlign
from torchvision_cases import CLASSES, fpn

SIZE = (64, 96)


class Backbone(nn.Module):
    size_divisibility = 32
    padding_constraints: dict = {}  # noqa: RUF012

    def __init__(self, channels, dense=True):
        super().__init__()
        self.inner, self.first = fpn(dense=dense, channels=channels), 3 if dense else 2

    def forward(self, images):
        return {f"p{self.first + level}": value for level, value in enumerate(self.inner(images).values())}


def current_storage():
    return sys.modules["detectron2.utils.events"].EventStorage.current[-1]


class Head(nn.Module):
    """Logits of each level, and no box deltas."""

    def __init__(self, channels, classes):
        super().__init__()
        self.norm, self.cls_score = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)

    def forward(self, levels):
        return [self.cls_score(self.norm(level)) for level in levels], []


class Detector(nn.Module):
    """The buffers and `preprocess_image` that detectron2's meta-architectures share."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor([103.5, 116.3, 123.7])[:, None, None], False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 57.0), False)

    def preprocess_image(self, inputs):
        """An ImageList; zeros in the padding."""
        images = [(entry["image"] - self.pixel_mean) / self.pixel_std for entry in inputs]
        rows, columns = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
        padded = torch.zeros(len(images), 3, rows, columns)
        for target, image in zip(padded, images):
            target[:, : image.shape[1], : image.shape[2]] = image
        assert self.backbone.size_divisibility == 32 and self.backbone.padding_constraints == {}
        return types.SimpleNamespace(tensor=padded, image_sizes=[image.shape[1:] for image in images])


class MetaArchitecture(Detector):
    """The order of calls of `RetinaNet`, with its moving `loss_normalizer`."""

    def __init__(self, channels=16, classes=CLASSES):
        super().__init__(Backbone(channels))
        self.head = Head(channels, classes)
        self.num_classes, self.loss_normalizer = classes, 100.0

    def forward(self, inputs):
        features = self.backbone(self.preprocess_image(inputs).tensor)
        scores, _ = self.head(list(features.values()))
        if not self.training:
            return scores
        count = sum(len(entry["instances"].gt_boxes.tensor) for entry in inputs)
        self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * max(count, 1)
        loss = sum(score.square().sum() for score in scores) / self.loss_normalizer
        current_storage().put_scalars(num_pos=count)
        return {"loss_cls": loss}


class RPN(nn.Module):
    """The order of calls of `RPN.forward`: it takes its levels by name and samples anchors at random."""

    in_features = ("p2", "p3", "p4", "p5", "p6")

    def __init__(self, channels):
        super().__init__()
        self.rpn_head = Head(channels, 3)

    def forward(self, images, features, gt_instances=None):
        logits, _ = self.rpn_head([features[name] for name in self.in_features])
        flat = torch.cat([level.flatten(1) for level in logits], 1)
        losses = {}
        if self.training:
            assert len(gt_instances) == len(flat) == len(images.image_sizes)
            losses["loss_rpn_cls"] = flat[:, torch.randperm(flat.shape[1])[:64]].square().mean()
            current_storage().put_scalar("rpn/num_pos_anchors", 1.0)
        corner = torch.rand(len(flat), 8, 2) * 20  # not differentiable, as its proposals
        return list(torch.cat([corner, corner + 16], 2)), losses


class ROIHeads(nn.Module):
    """The order of calls of `StandardROIHeads.forward`: a pooler over some of the levels, by name."""

    box_in_features = ("p2", "p3", "p4", "p5")

    def __init__(self, channels, classes):
        super().__init__()
        self.num_classes = classes
        self.box_pooler = MultiScaleRoIAlign([str(level) for level in range(4)], 2, 2)
        self.box_predictor = nn.Linear(4 * channels, classes + 1)

    def forward(self, images, features, proposals, targets=None):
        levels = {str(level): features[name] for level, name in enumerate(self.box_in_features)}
        if self.training:
            current_storage().put_scalar("roi_head/num_fg_samples", float(len(targets)))
        pooled = self.box_pooler(levels, proposals, images.image_sizes)
        return proposals, {"loss_cls": self.box_predictor(pooled.flatten(1)).square().mean()}


class GeneralizedRCNN(Detector):
    """The order of calls of `GeneralizedRCNN`, with its drawings every `vis_period` iterations."""

    def __init__(self, channels=16, classes=CLASSES):
        super().__init__(Backbone(channels, dense=False))
        self.proposal_generator, self.roi_heads = RPN(channels), ROIHeads(channels, classes)
        self.vis_period, self.drawings = 20, 0

    def forward(self, inputs):
        images = self.preprocess_image(inputs)
        targets = [entry["instances"] for entry in inputs] if "instances" in inputs[0] else None
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        _, detector_losses = self.roi_heads(images, features, proposals, targets)
        if current_storage().iter % self.vis_period == 0:
            self.drawings += 1
        return {**detector_losses, **proposal_losses}


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
        self.start_iter, self.max_iter, self.hooks = 0, config.SOLVER.MAX_ITER, []

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
