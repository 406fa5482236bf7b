"""The detectron2 adapter: held to the calls of detectron2 0.6's meta-architectures, on stand-ins with its interface.

The stand-ins (detectron2_cases.py) copy the order of calls in `RetinaNet.forward` and `GeneralizedRCNN.forward`. Where
detectron2 can be imported, of which its sources without the compiled extension are enough, the last test runs its own.
"""

import importlib.util
import types

import pytest
import torch
from detectron2_cases import GeneralizedRCNN, MetaArchitecture, inputs
from torch import nn
from torchvision_cases import CLASSES

from fastkd.integrations.detectron2 import attach


def attached(method, kind=MetaArchitecture):
    torch.manual_seed(0)
    model = kind().train()
    teacher = None if method == "lgd" else kind(24).eval()
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


@pytest.mark.parametrize("method", ["icd", "lgd", "scorel2"])
def test_an_rcnn(method, detectron2_modules):
    """The second pass runs proposals and heads, with random numbers, scalars and drawings of its own."""
    model, kd = attached(method, GeneralizedRCNN)
    detectron2_modules.iter = 5
    torch.manual_seed(0)
    plain = GeneralizedRCNN().train()
    torch.manual_seed(3)
    losses, following = model(inputs()), torch.rand(1)
    scalars, detectron2_modules.scalars = detectron2_modules.scalars, {}
    torch.manual_seed(3)
    for key, value in plain(inputs()).items():
        assert torch.equal(value, losses[key]), key
    assert torch.equal(torch.rand(1), following) and detectron2_modules.scalars == scalars and len(scalars) == 2
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert model.drawings == 0 and kd.distillation.facts.two_stage
    assert {name for name in losses if name.startswith("lgd_loss")} == (
        {"lgd_loss_cls", "lgd_loss_rpn_cls"} if method == "lgd" else set()
    )
    losses[f"{method}_distill"].backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    sum(losses.values()).backward()
    kd.step()
    kd.detach()
    assert set(model(inputs())) == {"loss_cls", "loss_rpn_cls"}


def test_a_teacher_of_other_normalisation_and_classes(detectron2_modules):
    """Its backbone gets the images that its own `preprocess_image` makes."""
    model, teacher = MetaArchitecture().train(), MetaArchitecture(24, CLASSES + 2).eval()
    teacher.pixel_mean, teacher.pixel_std = torch.tensor([123.7, 116.3, 103.5])[:, None, None], torch.ones(3, 1, 1)
    with pytest.warns(UserWarning, match=f"the teacher knows {CLASSES + 2} classes, the student {CLASSES}"):
        attach(model, "icd", teacher=teacher)
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(inputs())
    torch.testing.assert_close(seen[0], teacher.preprocess_image(inputs()).tensor, rtol=1e-5, atol=1e-3)


def test_the_hook_steps_logs_and_resumes(detectron2_modules):
    model, kd = attached("icd")
    hook = kd.callback
    hook.trainer = types.SimpleNamespace(model=model, max_iter=4, start_iter=0, iter=0, storage=detectron2_modules)
    hook.before_train()
    sum(model(inputs()).values()).backward()
    hook.after_step()
    assert kd.state.steps == 1 and kd.distillation.total_steps == 4
    assert "fastkd/icd_distill" in detectron2_modules.scalars
    _, again = attached("icd")
    again.callback.load_state_dict(hook.state_dict())
    assert again.state.steps == 1


def test_the_hook_refuses_other_models_and_misses_its_state(detectron2_modules):
    model, kd = attached("lgd")
    hook = kd.callback
    for trained, words in [
        (MetaArchitecture(), "must train the attached MetaArchitecture, got another"),
        (nn.DataParallel(model), "must not wrap its model in DataParallel; of the wrappers only DistributedData"),
    ]:
        hook.trainer = types.SimpleNamespace(model=trained, max_iter=4, start_iter=0)
        with pytest.raises(ValueError, match=words):
            hook.before_train()
    hook.trainer = types.SimpleNamespace(model=model, max_iter=4, start_iter=2)
    with pytest.warns(UserWarning, match=r"resumes at step 2, but its checkpoint has no state of Distil.*starts anew"):
        hook.before_train()


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
    with pytest.raises(TypeError, match=r"must be a detectron2 detector, got Linear without backbone.*\(detectron2 "):
        attach(nn.Linear(1, 1), "lgd")
    with pytest.raises(ValueError, match="must be that of the model, 5, got 3"):
        attach(MetaArchitecture(), "lgd", num_classes=3)
    model = MetaArchitecture()
    model.num_classes = None
    with pytest.raises(ValueError, match="num_classes must be given"):
        attach(model, "lgd")


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="detectron2 is not installed")
@pytest.mark.parametrize("kind", ["RetinaNet", "GeneralizedRCNN"])
@pytest.mark.parametrize("method", ["icd", "lgd", "scorel2"])
def test_its_own_detectors(kind, method):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage as Storage

    def model_of(depth, seed):
        config, stages = get_cfg(), ["res2", "res3", "res4", "res5"]
        config.MODEL.DEVICE, config.MODEL.META_ARCHITECTURE = "cpu", kind
        config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS, config.MODEL.RESNETS.NORM = depth, 64, "BN"
        config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        config.MODEL.RETINANET.NUM_CLASSES = config.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
        if kind == "RetinaNet":
            config.MODEL.BACKBONE.NAME, stages = "build_retinanet_resnet_fpn_backbone", stages[1:]
        config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = stages
        config.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        config.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        config.MODEL.ROI_HEADS.NAME, config.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
        config.MODEL.ROI_BOX_HEAD.NAME, config.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
        config.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        torch.manual_seed(seed)
        return build_model(config)

    def run(model):
        entries = inputs()
        for entry in entries:
            own = Instances(tuple(entry["image"].shape[1:]))
            own.gt_boxes, own.gt_classes = Boxes(entry["instances"].gt_boxes.tensor), entry["instances"].gt_classes
            entry["instances"] = own
        torch.manual_seed(3)
        with Storage() as storage:
            return model(entries), set(storage.latest()), torch.rand(1)

    model, plain = (model_of(18, 0).train() for _ in range(2))
    kd = attach(model, method, teacher=None if method == "lgd" else model_of(34, 1).eval(), detach_steps=0)
    (losses, scalars, following), (expected, own, plain_following) = run(model), run(plain)
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert scalars == own and torch.equal(following, plain_following)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    sum(losses.values()).backward()
    kd.step()
    assert losses[f"{method}_distill"].isfinite()
    assert any(name.startswith("lgd_loss") for name in losses) == (method == "lgd")
