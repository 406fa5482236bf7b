"""Every backbone: the right pyramid, gradients, frozen stages, torchvision's names; deformable convolutions; timm."""

import sys
import types

import pytest
import torch
import torchvision
from detector_cases import rectangles, small_config
from safetensors.torch import save_file
from torch import nn

from fastkd.detectors import DetectorConfig, build_detector, load_backbone_weights
from fastkd.detectors.backbones.deformable import ModulatedDeformConv

BACKBONES = {
    "resnet50 dcn": {"backbone": "resnet50", "deformable": True},
    "resnext101_32x8d": {"backbone": "resnext101_32x8d"},
    "resnext101_32x8d dcn": {"backbone": "resnext101_32x8d", "deformable": True},
    "swin_t": {"backbone": "swin_t"},
    "mobilenet_v2": {"backbone": "mobilenet_v2"},
}
FULL_WIDTHS = {
    "resnet50": [256, 512, 1024, 2048],
    "resnext101_32x8d": [256, 512, 1024, 2048],
    "swin_t": [96, 192, 384, 768],
    "mobilenet_v2": [24, 32, 96, 320],
}


def small(name, kind="retinanet", **changes):
    torch.manual_seed(2)
    return build_detector(small_config(kind, **({"width": 0.125, "channels": 16} | BACKBONES[name] | changes)))


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid_and_gradients(name, kind):
    detector = small(name, kind).train()
    pyramid = detector.features(rectangles([1], size=(64, 96)).images)
    expected = [(1, 16, -(-64 // stride), -(-96 // stride)) for stride in detector.strides]
    assert [tuple(level.shape) for level in pyramid] == expected
    sum(level.square().sum() for level in pyramid).backward()
    for part in (detector.backbone, detector.neck):
        for parameter_name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    first = detector.backbone.get_parameter(next(name for name, _ in detector.backbone.named_parameters()))
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet50 dcn", "swin_t", "mobilenet_v2"])
def test_bfloat16_and_channels_last(name):
    detector = small(name).to(memory_format=torch.channels_last).eval()
    images = rectangles([1]).images
    with torch.no_grad():
        plain = detector.features(images)
        with torch.autocast("cpu", torch.bfloat16):
            halved = detector.features(images.contiguous(memory_format=torch.channels_last))
    for one, other in zip(halved, plain, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.1 * other.abs().max().item())


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_stages(name):
    for frozen in (1, 2, 5):
        with torch.device("meta"):
            backbone = small(name, frozen_stages=frozen).backbone.train()
        trains = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
        if frozen == 5:
            assert all(key.startswith("out_norms") for key in trains)
            continue
        own = {"swin_t": ("features.0.", "features.1."), "mobilenet_v2": ("features.0.", "features.2.")}
        stem, second = own.get(name, ("conv1", "layer1."))
        assert not any(key.startswith(stem) for key in trains)
        assert any(key.startswith(second) for key in trains) == (frozen == 1)
        assert backbone.training and not backbone.get_submodule(stem.rstrip(".")).training


@pytest.mark.parametrize("name", BACKBONES)
def test_names_and_widths_are_torchvisions(name):
    settings = BACKBONES[name]
    with torch.device("meta"):
        backbone = build_detector(DetectorConfig(norm="bn", **settings)).backbone
        original = getattr(torchvision.models, settings["backbone"])().state_dict()
    assert backbone.out_channels == FULL_WIDTHS[settings["backbone"]]
    ours = {key: value.shape for key, value in backbone.state_dict().items()}
    left_out = ("fc.", "norm.", "head.", "classifier.", "features.18.")
    left_out = left_out if settings["backbone"] == "mobilenet_v2" else left_out[:-1]
    theirs = {key: value.shape for key, value in original.items() if not key.startswith(left_out)}
    assert {key: shape for key, shape in ours.items() if not key.endswith(backbone.fresh or ("-",))} == theirs
    deformable = {key for key in ours if "offset" in key}
    assert all(key.startswith(("layer2", "layer3", "layer4")) for key in deformable)
    convolutions = {key.replace(".weight", "") for key in ours if key.endswith(".conv2.weight") and "layer1" not in key}
    expected = {f"{key}.offset.{part}" for key in convolutions for part in ("weight", "bias")}
    assert deformable == (expected if settings.get("deformable") else set())


def test_swin_and_mobilenet_compute_what_torchvision_computes():
    images = torch.randn(1, 3, 64, 64)
    original = torchvision.models.swin_t().eval()
    ours = build_detector(small_config("faster_rcnn", backbone="swin_t", width=1.0)).backbone.eval()
    ours.load_state_dict(original.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[3], original.norm(original.features(images)).permute(0, 3, 1, 2))
    original = torchvision.models.mobilenet_v2().eval()
    ours = build_detector(small_config("faster_rcnn", backbone="mobilenet_v2", width=1.0, norm="bn")).backbone.eval()
    ours.load_state_dict(original.state_dict(), strict=False)
    with torch.no_grad():
        maps = ours(images)
        torch.testing.assert_close(original.features[18](maps[3]), original.features(images))


def test_a_fresh_deformable_convolution_is_half_the_plain_one():
    for groups, stride in ((1, 1), (4, 2)):
        plain = nn.Conv2d(8, 8, 3, stride=stride, padding=1, groups=groups)
        deformable = ModulatedDeformConv(plain)
        assert deformable.weight is plain.weight
        maps = torch.randn(2, 8, 7, 9)
        bias = plain.bias[:, None, None]
        torch.testing.assert_close(deformable(maps) - bias, 0.5 * (plain(maps) - bias), rtol=1e-4, atol=1e-5)


def test_a_deformable_convolution_follows_its_offsets_and_mask():
    plain = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    deformable = ModulatedDeformConv(plain)
    maps = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        deformable.offset.bias[0:18:2] = 1.0  # every tap one row further down
        deformable.offset.bias[18:] = 100.0  # and with full weight
        moved = torch.nn.functional.pad(maps, (0, 0, 0, 1))[:, :, 1:]
        torch.testing.assert_close(deformable(maps)[:, :, 1:-1], plain(moved)[:, :, 1:-1], rtol=1e-4, atol=1e-5)


def test_weight_files_fill_all_but_what_classifiers_lack(tmp_path):
    original = torchvision.models.resnet50().state_dict()
    save_file(original, tmp_path / "resnet50.safetensors")
    detector = build_detector(small_config("retinanet", backbone="resnet50", width=1.0, deformable=True))
    report = load_backbone_weights(detector, tmp_path / "resnet50.safetensors")
    assert report.complete
    loaded = detector.backbone.layer3[2].conv2
    assert torch.equal(loaded.weight, original["layer3.2.conv2.weight"]) and loaded.offset.weight.abs().max() == 0
    del original["layer3.2.conv2.weight"]
    save_file(original, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"missing: layer3.2.conv2.weight"):
        load_backbone_weights(detector, tmp_path / "less.safetensors")


class StandIn(nn.Module):
    """Dummy of timm.create_model(..., features_only=True): five maps and their description."""

    def __init__(self, strides=(2, 4, 8, 16, 32), layout=None):
        super().__init__()
        channels = [4, 8, 8, 16, 24]
        self.stages_0 = nn.Conv2d(3, channels[0], 2, stride=2)
        for index in range(1, len(strides)):
            self.add_module(f"stages_{index}", nn.Conv2d(channels[index - 1], channels[index], 2, stride=2))
        self.feature_info = types.SimpleNamespace(channels=lambda: channels, reduction=lambda: list(strides))
        if layout:
            self.output_fmt = types.SimpleNamespace(value=layout)

    def forward(self, x):
        maps = []
        for stage in self.children():
            x = stage(x)
            maps.append(x.permute(0, 2, 3, 1) if hasattr(self, "output_fmt") else x)
        return maps


@pytest.fixture
def timm(monkeypatch):
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        if name == "unheard_of":
            raise RuntimeError("Unknown model (unheard_of)")
        return StandIn((2, 4, 8, 8, 8) if name == "plain" else (2, 4, 8, 16, 32), "NHWC" if "swin" in name else None)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return asked


@pytest.mark.parametrize("name", ["convnext_tiny.fb_in1k", "swin_like"])
def test_timm_backbones(timm, tmp_path, name):
    config = DetectorConfig(backbone=f"timm:{name}", channels=16, num_classes=3)
    detector = build_detector(config)
    assert timm == {"name": name, "features_only": True, "pretrained": False}
    pyramid = detector.features(torch.randn(1, 3, 64, 64))
    assert [level.shape[-1] for level in pyramid] == [8, 4, 2, 1, 1]
    sum(level.sum() for level in pyramid).backward()
    assert all(parameter.grad is not None for parameter in detector.backbone.parameters())
    original = {key.replace("_", ".", 1): value + 1 for key, value in detector.backbone.body.state_dict().items()}
    save_file(original, tmp_path / "timm.safetensors")  # stages.0.weight, as the whole model calls it
    assert load_backbone_weights(detector, tmp_path / "timm.safetensors").complete
    assert torch.equal(detector.backbone.body.stages_1.weight, original["stages.1.weight"])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_real_models_of_timm(name):
    detector = build_detector(DetectorConfig(backbone=f"timm:{name}", channels=16, head_convs=1, num_classes=3))
    pyramid = detector.features(torch.randn(1, 3, 96, 64))
    assert [tuple(level.shape[2:]) for level in pyramid] == [(12, 8), (6, 4), (3, 2), (2, 1), (1, 1)]
    sum(level.square().mean() for level in pyramid).backward()
    reached = [value.grad is not None for value in detector.backbone.parameters()]
    assert sum(reached) > 0.5 * len(reached)


def test_timm_models_that_do_not_fit(timm):
    with pytest.raises(ValueError, match=r"strides \(4, 8, 16, 32\), got timm:plain"):
        build_detector(DetectorConfig(backbone="timm:plain"))
    with pytest.raises(ValueError, match="must be a model timm can build, got timm:unheard_of"):
        build_detector(DetectorConfig(backbone="timm:unheard_of"))


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'fastkd\[timm\]'"):
        build_detector(DetectorConfig(backbone="timm:convnext_tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "timm:hf-hub:someone/model"}, "backbone must be"),
        ({"backbone": "timm:"}, "backbone must be"),
        ({"backbone": "timm:convnext_tiny", "width": 0.5}, "width must be 1 for a timm"),
        ({"backbone": "timm:convnext_tiny", "frozen_stages": 2}, "frozen_stages must be 0 for a timm"),
        ({"backbone": "resnet18", "deformable": True}, "deformable must be False for resnet18"),
        ({"backbone": "swin_t", "deformable": True}, "deformable must be False for swin_t"),
        ({"deformable": 1}, "deformable must be True or False"),
    ],
)
def test_bad_backbones_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(**changes)
