"""The mmdetection adapter: held to the calls of mmdetection 3's detectors, on stand-ins with their interface.

The stand-ins (mmdetection_cases.py) copy the order of calls in `BaseDetector.forward`, `SingleStageDetector.loss` and
`TwoStageDetector.loss`. Where mmdetection and mmcv's ops can be imported, the last test runs its own detectors.
"""

import importlib.util
import types

import pytest
import torch
from mmdetection_cases import Detector, TwoStageDetector, data
from torch import nn
from torchvision_cases import CLASSES, BasicNet

from fastkd.integrations.mmdetection import _total, attach


def attached(method, kind=Detector):
    torch.manual_seed(0)
    model = kind().train()
    teacher = None if method == "lgd" else kind(24).eval()
    return model, attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_losses_join_and_the_second_pass_leaves_no_trace(method):
    model, kd = attached(method)
    losses = model(**data(), mode="loss")
    torch.manual_seed(0)
    plain = Detector().train()
    assert torch.equal(torch.stack(plain(**data(), mode="loss")["loss_cls"]), torch.stack(losses["loss_cls"]))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert "extract_feat" not in vars(model)
    own = [name for name in losses if name.startswith(method)]
    assert all("loss" in name for name in own) and ("lgd_loss_cls" in own) == (method == "lgd")
    losses[f"{method}_distill_loss"].backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.any() for p in model.neck.parameters())
    batch = kd.distillation.probe.batch
    assert batch.image_sizes.tolist() == [[64, 96], [48, 64]] and batch.labels.tolist() == [0, 0, 1]
    assert isinstance(model(data()["inputs"]), tuple)  # mode="tensor"
    kd.detach()
    assert set(model(**data(), mode="loss")) == {"loss_cls", "acc"}


@pytest.mark.parametrize("method", ["icd", "lgd", "scorel2"])
def test_an_rcnn(method):
    """The second pass runs proposals and heads, with random numbers of its own."""
    model, kd = attached(method, TwoStageDetector)
    torch.manual_seed(0)
    plain = TwoStageDetector().train()
    torch.manual_seed(3)
    losses, following = model(**data(), mode="loss"), torch.rand(1)
    torch.manual_seed(3)
    expected = plain(**data(), mode="loss")
    assert torch.equal(expected["loss_cls"], losses["loss_cls"]) and torch.equal(torch.rand(1), following)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    own = {name: value for name, value in losses.items() if name not in expected}
    heads = {"lgd_loss_cls", "lgd_loss_rpn_cls", "lgd_rpn_loss_bbox"}
    assert heads & set(own) == (heads if method == "lgd" else set()) and kd.distillation.facts.two_stage
    own[f"{method}_distill_loss"].backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.any() for p in model.neck.parameters())
    sum(own.values()).backward()
    kd.step()
    kd.detach()
    assert set(model(**data(), mode="loss")) == set(expected)


def test_a_teacher_of_other_normalisation_and_classes():
    """It gets the pixels of the student's images as its own preprocessor would normalise them."""
    model, teacher = Detector().train(), Detector(24, CLASSES + 2).eval()
    teacher.data_preprocessor.mean, teacher.data_preprocessor.std = torch.full((3, 1, 1), 100.0), torch.ones(3, 1, 1)
    with pytest.warns(UserWarning, match=f"the teacher knows {CLASSES + 2} classes, the student {CLASSES}"):
        attach(model, "icd", teacher=teacher)
    seen, given = [], data()
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**given, mode="loss")
    for image, sample, found in zip(given["inputs"], given["data_samples"], seen[0]):
        height, width = sample.img_shape
        values = (image[:, :height, :width] * 57 + 120 - 100) / 1  # in [0, 255], then the teacher's mean and std
        torch.testing.assert_close(found[:, :height, :width], values, rtol=1e-4, atol=1e-3)
        assert not found[:, height:].any() and not found[:, :, width:].any()


def test_a_preprocessor_that_does_not_normalise():
    """Its images have values in [0, 255], as those of YOLOX."""
    model = Detector()
    model.data_preprocessor = nn.Identity()
    kd = attach(model, "lgd")
    assert kd.normalization.std == (1 / 255,) * 3 and kd.normalization.mean == (0, 0, 0)


def test_the_hook_steps_saves_and_resumes(mmdetection_modules):
    model, kd = attached("icd")
    hook, updates = kd.callback, iter([False, True])
    wrapper = types.SimpleNamespace(should_update=lambda: next(updates))
    runner, checkpoint = (
        types.SimpleNamespace(model=model, iter=0, max_iters=4, optim_wrapper=wrapper),
        {"state_dict": {}},
    )
    hook.before_train(runner)
    for index in range(2):  # two batches, one update
        losses = model(**data(), mode="loss")
        losses["icd_localisation_loss"].backward()
        hook.after_train_iter(runner, index)
    assert kd.state.steps == 1 and kd.distillation.total_steps == 4
    hook.before_save_checkpoint(runner, checkpoint)
    assert not checkpoint["state_dict"]
    _, again = attached("icd")
    again.callback.after_load_checkpoint(runner, checkpoint)
    assert again.state.steps == 1
    again.callback.after_load_checkpoint(runner, {"state_dict": {}})  # state of a run without distillation


def test_the_hook_refuses_other_models_and_misses_its_state(mmdetection_modules):
    model, kd = attached("lgd")
    for trained, words in [
        (Detector(), "must train the attached Detector, got another"),
        (nn.DataParallel(model), "must not wrap its model in DataParallel; of the wrappers only DistributedData"),
    ]:
        with pytest.raises(ValueError, match=words):
            kd.callback.before_train(types.SimpleNamespace(model=trained, iter=0))
    runner = types.SimpleNamespace(model=model, iter=2, max_iters=4, optim_wrapper=None)
    with pytest.warns(UserWarning, match="resumes at step 2, but its checkpoint has no key 'fastkd'.*starts anew"):
        kd.callback.before_train(runner)


def test_mmengines_runner_steps_saves_and_resumes(tmp_path, monkeypatch):
    """The real Runner, with the stand-in detector and accumulation: a resumed run ends as an uninterrupted one."""
    runners = pytest.importorskip("mmengine.runner", reason="mmengine is not installed")
    from mmengine.model import BaseModel

    class Trained(BaseModel):
        extract_feat, loss, forward = Detector.extract_feat, Detector.loss, Detector.forward

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            parts = Detector()
            self.backbone, self.neck, self.bbox_head = parts.backbone, parts.neck, parts.bbox_head

    def run(name, **options):
        batches = [data(seed) for seed in range(8)]
        loader = torch.utils.data.DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0])
        runner = runners.Runner(
            Trained(), str(tmp_path / name), loader, train_cfg={"by_epoch": False, "max_iters": 8},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.001}, "accumulative_counts": 2}, experiment_name=name,
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 4, "by_epoch": False}}, **options,
        )  # fmt: skip
        torch.manual_seed(1)  # the Runner sets a random seed
        kd = attach(runner.model, "icd", teacher=Detector(24).eval(), detach_steps=0)
        runner.register_hook(kd.callback)
        runner.train()
        return runner.model, kd

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine's checkpoints hold objects of its own
    model, kd = run("whole")
    assert kd.state.steps == 4 and kd.state.computed == 8 and kd.distillation.total_steps == 4
    again, again_kd = run("resumed", load_from=str(tmp_path / "whole" / "iter_4.pth"), resume=True)
    assert again_kd.state.steps == 4 and again_kd.state.computed == 8
    for mine, theirs in zip(kd.distillation.network.parameters(), again_kd.distillation.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    Detector().load_state_dict(model.state_dict(), strict=True)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_bad_input():
    with pytest.raises(TypeError, match=r"an mmdetection detector, got BasicNet without extract_feat.*\(mmdet "):
        attach(BasicNet(), "lgd")
    model = Detector()
    model.bbox_head.num_classes = None
    with pytest.raises(ValueError, match="num_classes must be given"):
        attach(model, "lgd")
    for kind in (Detector, TwoStageDetector):
        with pytest.raises(ValueError, match="must be that of the model, 5, got 3"):
            attach(kind(), "lgd", num_classes=3)
    with pytest.raises(TypeError, match="priors must be a ClassPriors or None in this host, got list"):
        attach(Detector(), "icd", teacher=Detector(24).eval(), priors=[data()])


@pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None or importlib.util.find_spec("mmcv._ext") is None,
    reason="mmdetection with mmcv's ops is not installed",
)
@pytest.mark.parametrize("name", ["retinanet/retinanet", "faster_rcnn/faster-rcnn", "cascade_rcnn/cascade-rcnn"])
@pytest.mark.parametrize("method", ["icd", "lgd", "scorel2"])
def test_its_own_detectors(name, method):
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.hub import get_config
    from mmengine.structures import InstanceData

    register_all_modules()

    def model_of(depth, seed):
        config = get_config(f"mmdet::{name}_r50_fpn_1x_coco.py").model
        config.backbone.depth, config.backbone.init_cfg, config.neck.in_channels = depth, None, [64, 128, 256, 512]
        heads = config.get("roi_head", config).bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.num_classes = CLASSES
        torch.manual_seed(seed)
        return MODELS.build(config)

    def run(model):
        given, samples = data(), []
        for sample in given["data_samples"]:
            boxes, shape = getattr(sample.gt_instances.bboxes, "tensor", sample.gt_instances.bboxes), sample.img_shape
            own = DetDataSample(metainfo={"img_shape": shape, "batch_input_shape": (64, 96), "pad_shape": (64, 96)})
            own.gt_instances = InstanceData(bboxes=boxes, labels=sample.gt_instances.labels)
            samples.append(own)
        torch.manual_seed(3)
        losses = model(given["inputs"], samples, mode="loss")
        return {key: _total(value) for key, value in losses.items()}, torch.rand(1)

    model, plain = (model_of(18, 0).train() for _ in range(2))
    kd = attach(model, method, teacher=None if method == "lgd" else model_of(34, 1).eval(), detach_steps=0)
    (losses, following), (expected, plain_following) = run(model), run(plain)
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    assert torch.equal(following, plain_following) and kd.distillation.facts.num_classes == CLASSES
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    sum(value for key, value in losses.items() if "loss" in key).backward()
    kd.step()
    assert losses[f"{method}_distill_loss"].isfinite()
    assert any(key.startswith("lgd_") for key in losses) == (method == "lgd")
