"""A detector of one's own: what it must have, what it need not have, and that no file imports it."""

import dataclasses
import sys
import textwrap

import pytest
import torch
from torch import nn

from fastkd.commands.common import take_detectors
from fastkd.commands.train import parse
from fastkd.detectors import DetectorConfig, RetinaNet, build_detector, load_detector, save_detector, use_detector
from fastkd.training import get_recipe, with_detector
from fastkd.training.step import StepModule


class Plain(nn.Module):
    """One level of stride 4; the four methods alone."""

    strides = (4,)

    def __init__(self, config):
        super().__init__()
        self.body, self.top = nn.Conv2d(3, config.channels, 4, 4), nn.Conv2d(config.channels, 1, 1)

    def features(self, images):
        return [self.body(images)]

    def loss(self, pyramid, batch):
        return {"mean": self.top(pyramid[0]).square().mean()}

    def detect(self, pyramid, batch):
        return []

    def parts(self):
        return {"backbone": self.body, "head": self.top}


class Wide(Plain):
    channels = 48


class Headless(Plain):
    def parts(self):
        return {"backbone": self.body}


class Heard(RetinaNet):
    """A detector of ours with another loss."""

    def losses(self, pyramids, batch):
        return [{"mean": pyramid[0].mean()} for pyramid in pyramids]


def config_of(detector, **changes):
    return DetectorConfig(**{"num_classes": 3, "channels": 32, "custom": use_detector(detector), **changes})


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Forgets the classes that a test registered with `use_detector`."""
    monkeypatch.setattr("fastkd.detectors.own._used", {})


def test_what_is_not_written_has_a_default():
    detector = build_detector(config_of(Plain))
    assert (detector.num_classes, detector.channels, detector.strides) == (3, 32, (4,))
    assert isinstance(detector.parts()["neck"], nn.Identity) and detector.tensor_parts() == {}
    pyramid = detector.features(torch.ones(1, 3, 8, 8))
    one, other = detector.losses([pyramid, [2 * pyramid[0]]], None)
    assert one["mean"] == detector.loss(pyramid, None)["mean"] != other["mean"]
    assert detector.imitation_anchors() == []
    with pytest.raises(ValueError, match=r"must score its cells, got .*test_own:Plain"):
        detector.cell_scores(pyramid)


def test_the_backbone_is_the_one_among_the_parts():
    """Freezing goes by `parts`, whatever the module is called."""
    detector = build_detector(config_of(Plain))
    module = StepModule(detector)
    names = frozenset(name for name, _ in module.named_parameters())
    module.apply_phase(dataclasses.replace(phase(), train_backbone=False), names)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        "detector.own.top.weight",
        "detector.own.top.bias",
    }
    assert not detector.own.body.training and detector.own.top.training


def phase():
    from fastkd.training.methods.phase import Phase

    return Phase()


def test_a_subclass_of_ours_keeps_its_names():
    detector = build_detector(config_of(Heard, backbone="resnet18", width=0.25))
    assert type(detector) is Heard and "head.classification_head.cls_logits.bias" in detector.state_dict()
    assert detector.strides == (8, 16, 32, 64, 128)


def test_through_a_file(tmp_path):
    detector, path = build_detector(config_of(Plain)), tmp_path / "own.safetensors"
    save_detector(detector, path, ["a", "b", "c"])
    loaded, names = load_detector(path)
    assert names == ["a", "b", "c"] and torch.equal(loaded.own.body.weight, detector.own.body.weight)


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "theirs.safetensors"
    detector = build_detector(config_of(Plain))
    detector.config = dataclasses.replace(detector.config, custom="stranger:Plain")
    save_detector(detector, path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"theirs.safetensors.*stranger:Plain must be imported by the user.*--det"):
        load_detector(path)
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Plain", "must be module:Class, as .* got 'Plain'"),
        ("a.b:c.d", "must be module:Class"),
        ("os;x:y", "must be module:Class"),
        ("no_such_module:Plain", "no_such_module of .* must be an importable module, got ModuleNotFoundError"),
        ("broken:Plain", "broken of broken:Plain must be an importable module, got ZeroDivisionError"),
        ("mine:Missing", "must name a class of .*mine.py, got no Missing there"),
        ("mine:value", "must be a subclass of torch.nn.Module, got 3"),
        ("mine:Half", "must have the methods features, loss, detect, parts, got no detect, parts"),
    ],
)
def test_names_that_lead_nowhere(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    text = """
    from torch import nn
    value = 3
    class Half(nn.Module):
        def features(self, images): return []
        def loss(self, pyramid, batch): return {}
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(ValueError, match=message):
        use_detector(name)


def test_classes_that_cannot_be_used():
    with pytest.raises(TypeError, match="must be a class or 'module:Class', got int"):
        use_detector(3)
    with pytest.raises(ValueError, match=r"must be module:Class.*<locals>"):
        use_detector(type("Inner", (Plain,), {"__qualname__": "f.<locals>.Inner"}))
    with pytest.raises(ValueError, match=r"\(1, 48, 2, 2\).*got \[\(1, 32, 2, 2\)\].*channels are 48.*`channels`"):
        build_detector(config_of(Wide))
    with pytest.raises(ValueError, match=r"parts of .*:Headless must name its head.*got \['backbone', 'neck'\]"):
        build_detector(config_of(Headless))
    with pytest.raises(ValueError, match="custom must be None or module:Class, got 'x'"):
        DetectorConfig(custom="x")


def test_command_line():
    name = use_detector(Plain)
    assert take_detectors(["--detector.width", "0.5", f"--detector={name}", "--seed", "3"]) == (
        [name],
        ["--detector.width", "0.5", "--seed", "3"],
    )
    recipe, _ = parse("scenes-retinanet-lgd", ["--detector", name, "--detector.channels", "32"])
    assert (recipe.detector.custom, recipe.detector.channels, recipe.backbone_weights) == (name, 32, None)
    assert recipe.method == get_recipe("scenes-retinanet-lgd").method
    kept = dataclasses.replace(recipe, backbone_weights="own.safetensors")
    assert with_detector(kept, name) == kept
