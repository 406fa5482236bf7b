"""Weight files: loading, reports, and refusals."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
import torchvision
from detector_cases import KINDS, rectangles, small_config
from safetensors.torch import load_file, save_file

from fastkd.detectors import (
    DetectorConfig,
    build_detector,
    check_teacher,
    inherit,
    load_backbone_weights,
    load_detector,
    save_detector,
)

NAMES = ["square", "circle", "bar"]


@pytest.fixture(scope="module")
def resnet18():
    return torchvision.models.resnet18().state_dict()


def full_width(**changes):
    return build_detector(small_config("retinanet", **({"width": 1.0} | changes)))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def write(path, tensors, wrapper=None):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, path)
    return path


@pytest.mark.parametrize(
    "prefix, suffix, wrapper",
    [
        ("", ".safetensors", None),
        ("backbone.body.", ".pth", None),
        ("module.", ".pt", "model"),
        ("module.backbone.", ".pth", "state_dict"),
    ],
)
def test_torchvision_files_fill_the_backbone(tmp_path, resnet18, prefix, suffix, wrapper):
    detector = full_width(norm="bn")
    path = write(tmp_path / f"w{suffix}", {prefix + name: value for name, value in resnet18.items()}, wrapper)
    report = load_backbone_weights(detector, path)
    assert report.complete and len(report.matched) == 120
    assert set(report.unexpected) == {f"{prefix}fc.weight", f"{prefix}fc.bias"}
    assert str(report).startswith("120 of 120 tensors") and "not used" in str(report)
    assert_same(state(detector.backbone), {name: v for name, v in resnet18.items() if not name.startswith("fc.")})


def test_frozen_norms_and_half_precision(tmp_path, resnet18):
    detector = full_width(norm="frozen_bn")
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in resnet18.items()}
    report = load_backbone_weights(detector, write(tmp_path / "w.safetensors", tensors))
    assert report.complete and len(report.matched) == 100  # no counters of batches
    assert all(value.dtype == torch.float32 for value in detector.backbone.state_dict().values())
    torch.testing.assert_close(detector.backbone.conv1.weight, resnet18["conv1.weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{"backbone": "resnet34"}, {"width": 0.5}, {"norm": "gn"}], ids=str)
def test_files_of_another_backbone(tmp_path, resnet18, changes):
    """Files of another depth or width are refused; another norm needs no other tensors."""
    detector = full_width(**changes)
    path, before = write(tmp_path / "w.pth", resnet18), state(detector.backbone)
    if "norm" in changes:
        assert load_backbone_weights(detector, path).complete
        return
    with pytest.raises(ValueError, match="does not fill a resnet"):
        load_backbone_weights(detector, path)
    assert_same(before, state(detector.backbone))
    report = load_backbone_weights(detector, path, strict=False)
    assert not report.complete and report.matched
    assert report.missing if "backbone" in changes else report.mismatched
    assert ("missing: " if "backbone" in changes else "needs [32, 3, 7, 7], got [64, 3, 7, 7]") in str(report)


def test_files_that_fit_nothing(tmp_path):
    path = write(tmp_path / "w.safetensors", {"encoder.weight": torch.zeros(3)})
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"no tensor of .*w.safetensors fits a resnet18"):
            load_backbone_weights(full_width(), path, strict=strict)


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def hostile_files(folder, resnet18):
    """(file, words of the error) of files that must not load."""
    (folder / "text.pth").write_text("no weights here")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "code.pth").write_bytes(pickle.dumps({"conv1.weight": Harmful()}, protocol=2))
    torch.save({"conv1.weight": Harmful()}, folder / "zipped_code.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"conv1.weight": 3}, folder / "numbers.pth")
    torch.save({}, folder / "nothing.pth")
    write(folder / "whole.pth", resnet18)
    write(folder / "whole.safetensors", resnet18)
    for name in ("whole.pth", "whole.safetensors"):
        content = (folder / name).read_bytes()
        (folder / f"half_{name}").write_bytes(content[: len(content) // 2])
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("data.pkl", "junk")
    write(folder / "nan.pth", resnet18 | {"layer1.0.conv1.weight": torch.full((64, 64, 3, 3), float("nan"))})
    damaged = "damaged or"
    return {
        "text.pth": damaged,
        "empty.pth": damaged,
        "empty.safetensors": damaged,
        "code.pth": damaged,
        "zipped_code.pth": damaged,
        "half_whole.pth": damaged,
        "half_whole.safetensors": damaged,
        "header.safetensors": damaged,
        "zip.pth": damaged,
        "list.pth": "must hold a state dict, got list",
        "numbers.pth": "must hold named tensors",
        "nothing.pth": "must hold a state dict",
        "nan.pth": "must be finite, got inf or nan in layer1.0.conv1.weight",
        "weights.bin": "must end in .safetensors, .pth or .pt",
    }


def test_hostile_backbone_files(tmp_path, resnet18, capsys):
    detector = full_width()
    before = state(detector)
    for name, words in hostile_files(tmp_path, resnet18).items():
        with pytest.raises(ValueError, match=words):
            load_backbone_weights(detector, tmp_path / name)
    for name in ("absent.pth", "absent.safetensors"):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            load_backbone_weights(detector, tmp_path / name)
    assert_same(before, state(detector))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_detector_comes_back(kind, tmp_path):
    detector, path = build_detector(small_config(kind, norm="bn")), tmp_path / "d.safetensors"
    batch = rectangles([1, 1])
    detector.train().features(batch.images)  # moves the statistics
    save_detector(detector, path, NAMES)
    random_state = torch.get_rng_state()
    loaded, names = load_detector(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert names == NAMES and loaded.config == detector.config and not loaded.training
    assert_same(state(loaded), state(detector))
    detector.eval()
    with torch.no_grad():
        for one, other in zip(loaded.features(batch.images), detector.features(batch.images), strict=True):
            assert torch.equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_are_half_as_large_and_load_as_float32(dtype, tmp_path):
    detector = full_width(norm="bn")
    save_detector(detector, tmp_path / "full.safetensors", NAMES)
    save_detector(detector, tmp_path / "half.safetensors", NAMES, dtype=dtype)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.51 * sizes[0]
    loaded = load_detector(tmp_path / "half.safetensors")[0]
    for name, value in loaded.state_dict().items():
        original = detector.state_dict()[name]
        assert value.dtype == original.dtype
        assert torch.equal(value, original.to(dtype).to(original.dtype) if value.is_floating_point() else original)


def test_what_save_detector_refuses(tmp_path):
    detector, path = build_detector(small_config("retinanet")), tmp_path / "d.safetensors"
    with pytest.raises(ValueError, match="class_names must hold 3 names, got 2"):
        save_detector(detector, path, NAMES[:2])
    with pytest.raises(ValueError, match="dtype must be float32"):
        save_detector(detector, path, NAMES, dtype=torch.float64)
    with torch.no_grad():
        detector.backbone.conv1.weight[0] = 1e6
    with pytest.raises(ValueError, match=r"as torch.float16: weights must be finite, got inf or nan in backbone.conv1"):
        save_detector(detector, path, NAMES, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_hostile_detector_files(tmp_path):
    config = small_config("retinanet")
    path = tmp_path / "d.safetensors"
    save_detector(build_detector(config), path, NAMES)
    tensors, content = load_file(path), path.read_bytes()
    good = {"format": "fastkd-detector-1", "config": json.dumps(config.to_dict()), "class_names": json.dumps(NAMES)}

    def refused(words, changes=None, weights=tensors):
        save_file(weights, path, metadata={**good, **(changes or {})})
        with pytest.raises(ValueError, match=words):
            load_detector(path)

    def other(**changes):
        return {"config": json.dumps(config.to_dict() | changes)}

    refused("has no format", {"format": "other"})
    refused("header of .* is not readable", {"config": "{"})
    refused("header of .* is not readable: DetectorConfig must be an object", {"config": "[]"})
    refused(r"must be made of the fields of DetectorConfig, got \['colour'\]", other(colour=1))
    refused("num_classes must be", other(num_classes=-1))
    refused("channels must be", other(channels="32"))
    refused("header of .* is not readable", {"config": "[" * 100_000})
    refused("must name its 4 classes", other(num_classes=4))
    refused("do not fit its configuration", other(channels=64))
    refused("do not fit its configuration|cannot be built", other(channels=10**9))
    refused("do not fit its configuration", other(backbone="resnet34"))
    refused("do not fit its configuration", other(detector="faster_rcnn"))
    refused("missing: backbone.conv1.weight", None, {k: v for k, v in tensors.items() if k != "backbone.conv1.weight"})
    refused("not used: extra", None, tensors | {"extra": torch.zeros(1)})
    refused("must be finite", None, tensors | {"backbone.bn1.bias": torch.full((16,), float("inf"))})
    save_file(tensors, path)
    with pytest.raises(ValueError, match="has no format"):
        load_detector(path)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_detector(path)
    with pytest.raises(FileNotFoundError):
        load_detector(tmp_path / "absent.safetensors")
    path.write_bytes(content)
    assert load_detector(path)[1] == NAMES


def test_inherit_takes_neck_and_head_where_they_agree():
    torch.manual_seed(1)
    teacher = build_detector(small_config("retinanet", width=0.5, backbone="resnet34"))
    student = build_detector(small_config("retinanet"))
    before, taught = state(student), state(teacher)
    report = inherit(student, teacher)
    total = sum(name.startswith(("neck.", "head.")) for name in before)
    assert len(report.mismatched) == 3  # the lateral convolutions read other widths
    assert str(report).startswith(f"{total - 3} of {total} tensors")
    assert report.matched and all(name.startswith(("neck.", "head.")) for name in report.matched)
    for name, value in student.state_dict().items():
        assert torch.equal(value, (taught if name in report.matched else before)[name])


def test_inherit_from_something_else_entirely():
    with pytest.raises(ValueError, match="no tensor of the teacher's neck and head"):
        inherit(
            build_detector(small_config("retinanet", channels=32)),
            build_detector(small_config("faster_rcnn", channels=40)),
        )


def test_check_teacher():
    student = build_detector(small_config("retinanet"))
    check_teacher(student, build_detector(small_config("fcos", width=0.5)), same_channels=True)
    wide = build_detector(small_config("retinanet", channels=64))
    check_teacher(student, wide)
    with pytest.raises(ValueError, match="the student's 32 channels, got 64"):
        check_teacher(student, wide, same_channels=True)
    with pytest.raises(ValueError, match="the student's 3 classes, got 4"):
        check_teacher(student, build_detector(small_config("retinanet", 4)))
    with pytest.raises(ValueError, match=r"the student's strides \(8, 16, 32, 64, 128\), got \(4, 8, 16, 32, 64\)"):
        check_teacher(student, build_detector(small_config("faster_rcnn")))


def test_default_configuration_is_torchvisions_retinanet():
    with torch.device("meta"):
        ours = build_detector(DetectorConfig(num_classes=91))
        theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    assert sum(p.numel() for p in ours.head.parameters()) == sum(p.numel() for p in theirs.head.parameters())
    assert {name: p.shape for name, p in ours.head.named_parameters()} == {
        name: p.shape for name, p in theirs.head.named_parameters()
    }
