"""The detectron2 adapter: held to the calls of detectron2 0.6's meta-architectures, on stand-ins with its interface.

The stand-ins copy the order of calls in `GeneralizedRCNN.forward` and `RetinaNet.forward`. Where detectron2 can be
imported, the last test runs its own RetinaNet.
"""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from torchvision_cases import CLASSES, fpn

from fastkd.integrations.detectron2 import attach

SIZE = (64, 96)


class EventStorage:
    current: list["EventStorage"] = []  # noqa: RUF012

    def __init__(self, start_iter=0):
        self.scalars = {}

    def __enter__(self):
        self.current.append(self)
        return self

    def __exit__(self, *args):
        self.current.pop()

    def put_scalars(self, **scalars):
        self.scalars.update(scalars)


class HookBase:
    def before_train(self): ...

    def after_step(self): ...


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules `detectron2.engine` and `detectron2.utils.events` with what the adapter imports."""
    for name, content in (("detectron2.engine", HookBase), ("detectron2.utils.events", EventStorage)):
        module = types.ModuleType(name)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, name, module)
    with EventStorage() as storage:
        yield storage


class Backbone(nn.Module):
    size_divisibility = 32
    padding_constraints: dict = {}  # noqa: RUF012

    def __init__(self, channels):
        super().__init__()
        self.inner = fpn(dense=True, channels=channels)

    def forward(self, images):
        return {f"p{3 + level}": value for level, value in enumerate(self.inner(images).values())}


class MetaArchitecture(nn.Module):
    """Order of calls, argument and attribute names as in detectron2's RetinaNet."""

    def __init__(self, channels=16):
        super().__init__()
        self.backbone = Backbone(channels)
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, CLASSES, 1))
        self.num_classes, self.loss_normalizer = CLASSES, 100.0
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
        scores = [self.head(level) for level in features.values()]
        if not self.training:
            return scores
        count = sum(len(entry["instances"].gt_boxes.tensor) for entry in inputs)
        self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * max(count, 1)
        loss = sum(score.square().sum() for score in scores) / self.loss_normalizer
        EventStorage.current[-1].put_scalars(num_pos=count)
        return {"loss_cls": loss}


def inputs():
    entries = []
    for index, (height, width) in enumerate((SIZE, (48, 64))):
        generator = torch.Generator().manual_seed(index)
        boxes = torch.tensor([[4.0, 4, 30, 40], [10, 8, 60, 44]])[: index + 1]
        instances = types.SimpleNamespace(
            gt_boxes=types.SimpleNamespace(tensor=boxes), gt_classes=torch.arange(index + 1)
        )
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        entries.append({"image": image, "instances": instances})
    return entries


def attached(method):
    torch.manual_seed(0)
    model = MetaArchitecture().train()
    teacher = None if method == "lgd" else MetaArchitecture(24).eval()
    return model, attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_losses_join_and_the_second_pass_leaves_no_trace(method, stand_ins):
    model, kd = attached(method)
    losses = model(inputs())
    torch.manual_seed(0)
    plain = MetaArchitecture().train()
    assert torch.equal(plain(inputs())["loss_cls"], losses["loss_cls"])
    assert plain.loss_normalizer == model.loss_normalizer and stand_ins.scalars == {"num_pos": 3}
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    losses[f"{method}_distill"].backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert ("lgd_loss_cls" in losses) == (method == "lgd")
    batch = kd.distillation.probe.batch
    assert batch.image_sizes.tolist() == [[64, 96], [48, 64]] and batch.labels.tolist() == [0, 0, 1]
    kd.detach()
    assert set(model(inputs())) == {"loss_cls"}
    assert isinstance(model.eval()(inputs()), list)


def test_the_hook_steps_logs_and_resumes(stand_ins):
    model, kd = attached("icd")
    hook = kd.callback
    hook.trainer = types.SimpleNamespace(max_iter=4, iter=0, storage=stand_ins)
    hook.before_train()
    sum(model(inputs()).values()).backward()
    hook.after_step()
    assert kd.state.steps == 1 and kd.distillation.total_steps == 4
    assert "fastkd/icd_distill" in stand_ins.scalars
    _, again = attached("icd")
    again.callback.load_state_dict(hook.state_dict())
    assert again.state.steps == 1


def test_bad_input():
    with pytest.raises(TypeError, match="must be a detectron2 detector, got Linear without backbone"):
        attach(nn.Linear(1, 1), "lgd")
    with pytest.raises(ValueError, match="must be that of the model, 5, got 3"):
        attach(MetaArchitecture(), "lgd", num_classes=3)
    model = MetaArchitecture()
    model.num_classes = None
    with pytest.raises(ValueError, match="num_classes must be given"):
        attach(model, "lgd")


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="detectron2 is not installed")
def test_its_own_retinanet():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage as Storage

    config = get_cfg()
    config.MODEL.META_ARCHITECTURE = "RetinaNet"
    config.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    config.MODEL.RESNETS.OUT_FEATURES, config.MODEL.FPN.IN_FEATURES = [["res3", "res4", "res5"]] * 2
    config.MODEL.DEVICE, config.MODEL.RETINANET.NUM_CLASSES = "cpu", CLASSES
    model = build_model(config).train()
    kd = attach(model, "lgd", detach_steps=0)
    entries = inputs()
    for entry in entries:
        own = Instances(tuple(entry["image"].shape[1:]))
        own.gt_boxes, own.gt_classes = Boxes(entry["instances"].gt_boxes.tensor), entry["instances"].gt_classes
        entry["instances"] = own
    with Storage():
        losses = model(entries)
    sum(losses.values()).backward()
    kd.step()
    assert losses["lgd_distill"].isfinite() and any(name.startswith("lgd_loss") for name in losses)
