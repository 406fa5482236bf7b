"""The detectron2 adapter: held to the calls of detectron2 0.6's meta-architectures, on stand-ins with its interface.

The stand-ins (detectron2_cases.py) copy the order of calls in `RetinaNet.forward`. Where detectron2 can be imported,
the last test runs its own RetinaNet.
"""

import importlib.util
import types

import pytest
import torch
from detectron2_cases import MetaArchitecture, inputs
from torch import nn
from torchvision_cases import CLASSES

from fastkd.integrations.detectron2 import attach


def attached(method):
    torch.manual_seed(0)
    model = MetaArchitecture().train()
    teacher = None if method == "lgd" else MetaArchitecture(24).eval()
    return model, attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_losses_join_and_the_second_pass_leaves_no_trace(method, detectron2_modules):
    model, kd = attached(method)
    losses = model(inputs())
    torch.manual_seed(0)
    plain = MetaArchitecture().train()
    assert torch.equal(plain(inputs())["loss_cls"], losses["loss_cls"])
    assert plain.loss_normalizer == model.loss_normalizer and detectron2_modules.scalars == {"num_pos": 3}
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


def test_the_hook_steps_logs_and_resumes(detectron2_modules):
    model, kd = attached("icd")
    hook = kd.callback
    hook.trainer = types.SimpleNamespace(max_iter=4, iter=0, storage=detectron2_modules)
    hook.before_train()
    sum(model(inputs()).values()).backward()
    hook.after_step()
    assert kd.state.steps == 1 and kd.distillation.total_steps == 4
    assert "fastkd/icd_distill" in detectron2_modules.scalars
    _, again = attached("icd")
    again.callback.load_state_dict(hook.state_dict())
    assert again.state.steps == 1


def test_a_model_inside_of_ddp(detectron2_modules, tmp_path):
    """detectron2's and mmengine's trainers wrap the model when they are built; `attach` then takes model.module."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(MetaArchitecture().train())
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.* or attach to its \.module"):
            attach(wrapped, "lgd")
        kd = attach(wrapped.module, "lgd", detach_steps=0)
        sum(wrapped(inputs()).values()).backward()
        kd.step()
        assert kd.state.steps == 1 and kd.state.losses["lgd_distill"] > 0
        assert all(p.grad is not None for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


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
