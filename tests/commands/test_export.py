"""ONNX graphs of all detectors against torch, and the export command."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from fastkd import cli, export
from fastkd.data import SCENE_CLASSES
from fastkd.detectors import DetectorConfig, build_detector, load_detector, save_detector
from fastkd.progress import Work

TINY = {"backbone": "resnet18", "width": 0.25, "channels": 32, "head_convs": 1, "num_classes": 10, "norm": "gn"}
TINY |= {"box_head_channels": 16, "mask_head_channels": 8}


class ShortBackbone(torch.nn.Module):
    """C2 .. C5 of four convolutions: tracing a ResNet with free sizes takes half a minute."""

    def __init__(self, widths=(16, 32, 64, 128)):
        super().__init__()
        steps = zip((3, *widths), widths, (4, 2, 2, 2))
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(i, o, 4, stride=s, padding=1) for i, o, s in steps)

    def forward(self, images):
        maps = []
        for layer in self.layers:
            images = layer(images)
            maps.append(images)
        return maps


def test_a_graph_takes_images_of_any_number_and_size(tmp_path):
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(**TINY)).eval()
    detector.backbone = ShortBackbone()
    report = export.export_onnx(detector, tmp_path, size=(128, 128))[0]
    assert list(report.outputs) == ["p3", "p4", "p5", "p6", "p7", "cls_logits", "bbox_regression"]
    assert report.tried == [(2, 3, 128, 128), (1, 3, 256, 384)] and report.relative_difference < 1e-4
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 384, 128)
    found = dict(zip(report.outputs, session.run(list(report.outputs), {"images": images.numpy()})))
    with torch.no_grad():
        pyramid = detector.features(images)
        heads = detector.head(pyramid)
    for name, expected in [*zip(("p3", "p4", "p5", "p6", "p7"), pyramid), *heads.items()]:
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=0, atol=1e-4 * expected.abs().max().item())


def test_the_export_command_writes_weights_and_graph(tmp_path, capsys, shown):
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(**TINY)).eval()
    save_detector(detector, tmp_path / "student.safetensors", SCENE_CLASSES)
    args = ["export", str(tmp_path / "student.safetensors"), "--out", str(tmp_path / "out"), "--height", "128"]
    assert cli.main([*args, "--width", "256", "--no-dynamic"]) == 0
    assert shown["export"] == ("parts", 2, 2)
    assert "largest difference between onnxruntime and torch" in capsys.readouterr().err
    again, names = load_detector(tmp_path / "out" / "model.safetensors")
    assert names == list(SCENE_CLASSES)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["class_names"] == list(SCENE_CLASSES)
    assert [level["stride"] for level in described["levels"]] == [8, 16, 32, 64, 128]
    graph = described["graphs"]["model.onnx"]
    assert graph["inputs"] == {"images": [1, 3, 128, 256]} and graph["largest_relative_difference"] < 1e-4


def test_two_stage_detectors_have_graphs_for_regions_and_masks(tmp_path):
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(detector="mask_rcnn", **TINY)).train()
    detector.backbone = ShortBackbone()
    reports = export.export_onnx(detector, tmp_path, size=(64, 64), dynamic=False)
    assert detector.training
    assert [report.path.name for report in reports] == ["model.onnx", "model-regions.onnx", "model-masks.onnx"]
    assert reports[1].outputs == {"class_logits": [5, 11], "box_deltas": [5, 44]}
    assert reports[2].outputs == {"mask_logits": [5, 11, 28, 28]}
    assert all(report.path.is_file() and report.relative_difference < 1e-4 for report in reports)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.path.name for report in reports)


def test_solov2_describes_levels_without_anchors():
    detector = build_detector(DetectorConfig(detector="solov2", **TINY))
    described = export.description(detector, SCENE_CLASSES, [])
    assert [(level["stride"], level["anchors_at_the_origin_xyxy"]) for level in described["levels"]] == [
        (stride, []) for stride in (4, 8, 16, 32, 64)
    ]
    names = [name for name, _ in export.raw_head_outputs(detector, detector.features(torch.randn(1, 3, 64, 64)))]
    assert names == ["cls_logits", "kernels", "mask_features"]


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "poto", "condinst", "faster_rcnn", "mask_rcnn"])
def test_raw_outputs_are_what_the_detectors_use(kind):
    detector = build_detector(DetectorConfig(detector=kind, **TINY)).eval()
    pyramid = detector.features(torch.randn(1, 3, 128, 128))
    outputs = dict(export.raw_head_outputs(detector, pyramid))
    cells = [level.shape[-2] * level.shape[-1] for level in pyramid]
    anchors = [len(cell) for cell in detector.imitation_anchors()]
    if not detector.config.two_stage:
        total = sum(count * per_cell for count, per_cell in zip(cells, anchors))
        assert outputs["cls_logits"].shape == (1, total, 10) and outputs["bbox_regression"].shape == (1, total, 4)
    else:
        assert outputs["objectness_p2"].numel() == cells[0] * anchors[0]
        assert outputs["proposal_deltas_p6"].numel() == 4 * cells[-1] * anchors[-1]
        logits, _, _ = detector.head.rpn(pyramid)
        assert logits.shape[1] * 5 == sum(tensor.numel() for tensor in outputs.values())


class Drifting(torch.nn.Module):
    """Computes in torch something other than the traced graph."""

    def forward(self, regions):
        return regions * 2 if torch.compiler.is_compiling() else regions * 2.1


def test_a_graph_that_disagrees_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="must agree with torch"):
        export._write_graph(Drifting(), tmp_path / "g.onnx", "regions", ["out"], [torch.ones(2, 3)], (), Work())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(100, 128), (128, 0), (-128, 128)])
def test_size_must_fit_the_pyramid(tmp_path, size):
    with pytest.raises(ValueError, match="multiples of the coarsest stride 128"):
        export.export_onnx(build_detector(DetectorConfig(**TINY)), tmp_path, size=size)


def test_without_the_onnx_packages(tmp_path, capsys, monkeypatch):
    save_detector(build_detector(DetectorConfig(**TINY)), tmp_path / "student.safetensors", SCENE_CLASSES)
    monkeypatch.setattr(export, "ONNX_MODULES", ("onnx", "no_such_runtime"))
    args = ["export", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert "got no no_such_runtime" in said and "pip install 'fastkd[onnx]'" in said
    assert cli.main([*args, "--no-onnx"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "model.json"}
    assert json.loads((tmp_path / "out" / "model.json").read_text())["graphs"] == {}


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert cli.main(["export", str(tmp_path / "x.safetensors"), "--no-onnx"]) == 2
    assert "x.safetensors" in capsys.readouterr().err
