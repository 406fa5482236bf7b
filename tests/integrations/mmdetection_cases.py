"""Detectors and a runner with mmdetection's order of calls, argument and attribute names, and data for them."""

import copy
import sys
import types

import torch
from torch import nn
from torchvision.ops import MultiScaleRoIAlign
from torchvision_cases import CLASSES, fpn


class Neck(nn.Module):
    def __init__(self, channels, dense=True):
        super().__init__()
        self.inner = fpn(dense=dense, channels=channels)

    def forward(self, images):
        return tuple(self.inner(images).values())


class Head(nn.Module):
    """Logits of each level, and no box deltas."""

    use_sigmoid_cls = True

    def __init__(self, channels, classes):
        super().__init__()
        self.num_classes = classes
        self.norm, self.conv_cls = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)

    def forward(self, levels):
        return [self.conv_cls(self.norm(level)) for level in levels], []


class Detector(nn.Module):
    """The order of calls of `SingleStageDetector`."""

    def __init__(self, channels=16, classes=CLASSES):
        super().__init__()
        self.backbone, self.neck, self.bbox_head = nn.Identity(), Neck(channels), Head(channels, classes)
        self.data_preprocessor = nn.Module()
        for name, value in (("mean", 120.0), ("std", 57.0)):
            self.data_preprocessor.register_buffer(name, torch.full((3, 1, 1), value), False)

    def extract_feat(self, inputs):
        return self.neck(self.backbone(inputs))

    def loss(self, inputs, data_samples):
        scores, _ = self.bbox_head(self.extract_feat(inputs))
        return {"loss_cls": [score.square().mean() for score in scores], "acc": scores[0].detach().mean()}

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.loss(inputs, data_samples) if mode == "loss" else self.extract_feat(inputs)


class RPNHead(Head):
    """The order of calls of `RPNHead.loss_and_predict`, with random proposals."""

    def loss_and_predict(self, x, batch_data_samples, proposal_cfg=None):
        scores, _ = self(x)
        assert not any(sample.gt_instances.labels.any() for sample in batch_data_samples)
        corner = torch.rand(len(batch_data_samples), 8, 2) * 20
        boxes = torch.cat([corner, corner + 16], 2)
        losses = {"loss_rpn_cls": [score.square().mean() for score in scores], "loss_bbox": scores[0].square().mean()}
        return losses, [types.SimpleNamespace(bboxes=each) for each in boxes]


class RoIHead(nn.Module):
    """The order of calls of `StandardRoIHead.loss`: it takes the first levels by position."""

    def __init__(self, channels, classes):
        super().__init__()
        self.bbox_roi_extractor = MultiScaleRoIAlign([str(level) for level in range(4)], 2, 2)
        self.bbox_head = nn.Linear(4 * channels, classes + 1)
        self.bbox_head.num_classes = classes

    def loss(self, x, rpn_results_list, batch_data_samples):
        assert len(rpn_results_list) == len(batch_data_samples)
        levels = {str(level): value for level, value in enumerate(x[:4])}
        sizes = [sample.img_shape for sample in batch_data_samples]
        pooled = self.bbox_roi_extractor(levels, [result.bboxes for result in rpn_results_list], sizes)
        return {"loss_cls": self.bbox_head(pooled.flatten(1)).square().mean(), "acc": pooled.detach().mean()}


class TwoStageDetector(Detector):
    """The order of calls of `TwoStageDetector.loss`."""

    def __init__(self, channels=16, classes=CLASSES):
        super().__init__(channels, classes)
        del self.bbox_head
        self.neck = Neck(channels, dense=False)
        self.rpn_head, self.roi_head = RPNHead(channels, 1), RoIHead(channels, classes)

    def loss(self, inputs, data_samples):
        x, samples = self.extract_feat(inputs), copy.deepcopy(data_samples)
        for sample in samples:
            sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
        rpn_losses, proposals = self.rpn_head.loss_and_predict(x, samples, proposal_cfg=None)
        losses = {key if "rpn" in key else f"rpn_{key}": value for key, value in rpn_losses.items()}
        return {**losses, **self.roi_head.loss(x, proposals, data_samples)}


def data(seed=0):
    samples = []
    for index, shape in enumerate(((64, 96), (48, 64))):
        boxes = torch.tensor([[4.0, 4, 30, 40], [10, 8, 60, 44]])[: index + 1]
        if index:  # mmdetection's own box type
            boxes = types.SimpleNamespace(tensor=boxes)
        instances = types.SimpleNamespace(bboxes=boxes, labels=torch.arange(index + 1))
        samples.append(types.SimpleNamespace(gt_instances=instances, img_shape=shape))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    return {"inputs": images, "data_samples": samples}


class Config(dict):
    """A configuration with its keys as attributes."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


def get_config(path):
    """The parts of mmdetection's configuration that the example changes."""
    assert path == "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
    return Config(model=Config(backbone=Config(depth=18), bbox_head=Config(num_classes=80)))


class Runner:
    """The loop of mmengine's `IterBasedTrainLoop`, without accumulation; models of depth 34 are wider."""

    def __init__(self, config):
        channels = 24 if config.model.backbone.depth == 34 else 16
        self.model = Detector(channels, config.model.bbox_head.num_classes).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.optim_wrapper["optimizer"]["lr"])
        self.optim_wrapper = types.SimpleNamespace(should_update=lambda: True)
        self.iter, self.max_iters, self.hooks = 0, config.train_cfg["max_iters"], []
        assert config.train_dataloader["dataset"]["metainfo"]["classes"] and config.val_cfg is config.test_cfg is None

    from_cfg = classmethod(lambda cls, config: cls(config))

    def register_hook(self, hook):
        assert isinstance(hook, sys.modules["mmengine.hooks"].Hook)
        self.hooks.append(hook)

    def train(self):
        for hook in self.hooks:
            hook.before_train(self)
        for index in range(self.max_iters):
            losses = self.model(**data(index), mode="loss")
            parts = [sum(value) if isinstance(value, list) else value for key, value in losses.items() if "loss" in key]
            self.optimizer.zero_grad()
            sum(parts).backward()
            self.optimizer.step()
            for hook in self.hooks:
                hook.after_train_iter(self, index, data_batch=None, outputs=None)


MODULES = {"mmengine.hub": {"get_config": get_config}, "mmengine.runner": {"Runner": Runner}}
