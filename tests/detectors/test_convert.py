"""Converted checkpoints of torchvision and detectron2 compute the same as the originals."""

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fastkd.cli import main
from fastkd.detectors import DetectorConfig, build_detector, convert_checkpoint, load_detector
from fastkd.detectors.weights.convert import convert_detectron2, convert_torchvision
from fastkd.types import Batch

RECORDED = Path(__file__).parents[1] / "data/detectron2_forward"
PARAMETERS = json.loads((RECORDED / "parameters.json").read_text())
MEAN_BGR = np.array([103.53, 116.28, 123.675], np.float32)[:, None, None]
STD_RGB = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
BOXES = torch.tensor([[4, 6, 90, 70], [30.5, 20.25, 61.75, 118], [0, 0, 159, 127], [100, 64, 131, 95]])


def draw(name):
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))


def parameter(name, shape):
    """A parameter as defined in README.md of the recorded outputs."""
    noise = draw(name).standard_normal(shape, dtype=np.float32)
    if ".norm." in name:
        scale = {"weight": 1 + 0.1 * noise, "running_var": 1 + 0.1 * np.abs(noise)}
        return scale.get(name.rsplit(".", 1)[1], 0.1 * noise).astype(np.float32)
    return noise * np.float32(0.1 if name.endswith("bias") else np.sqrt(1 / np.prod(shape[1:])))


def checkpoint(architecture):
    return {name: parameter(name, shape) for name, shape in PARAMETERS[architecture].items()}


def our_images():
    """The recorded input in our format: RGB, divided by the standard deviation."""
    bgr = draw("input").uniform(0, 255, (1, 3, 128, 160)).astype(np.float32) - MEAN_BGR
    return torch.from_numpy(bgr).flip(1) / STD_RGB


def assert_agrees(ours, recorded, name):
    ours = ours.detach().numpy()
    assert ours.shape == recorded.shape, name
    error = np.abs(ours - recorded).max() / np.abs(recorded).max()
    assert error < 1e-3, f"{name}: {error:.1e} of the largest value"


def by_scale(channels, values):
    """Channels [A * values, H, W] of our nine anchors, ratio by ratio, in detectron2's order, scale by scale."""
    return channels.unflatten(0, (3, 3, values)).transpose(0, 1).flatten(0, 2)


def assert_retinanet_agrees(detector, pyramid, recorded):
    outputs = detector.head(pyramid)
    start = 0
    for number, level in enumerate(pyramid, start=3):
        height, width = level.shape[-2:]
        end = start + height * width * 9
        for key, name, values, step in (("cls_logits", "logits", 80, 10), ("bbox_regression", "deltas", 4, 1)):
            rows = outputs[key][0, start:end].view(height, width, 9 * values).permute(2, 0, 1)
            assert_agrees(by_scale(rows, values)[::step], recorded[f"{name}_p{number}"], f"{name}_p{number}")
        start = end
    anchors = detector.anchors(pyramid)
    for name, ours in (("anchors_p3_first9", anchors[0][:9]), ("anchors_p7", anchors[-1])):
        assert_agrees(ours.unflatten(0, (-1, 3, 3)).transpose(1, 2).flatten(0, 2), recorded[name], name)


def assert_two_stage_agrees(detector, pyramid, recorded):
    logits, deltas = detector.head.rpn.head(pyramid)
    for number in range(5):
        assert_agrees(logits[number][0], recorded[f"rpn_logits_p{number + 2}"], "rpn_logits")
        assert_agrees(deltas[number][0], recorded[f"rpn_deltas_p{number + 2}"], "rpn_deltas")
    heads = detector.head.roi_heads
    pooled = heads.box_roi_pool(pyramid, [BOXES])
    assert_agrees(pooled[:, ::16], recorded["box_pooled"], "box_pooled")
    scores, deltas = heads._boxes(pyramid, [BOXES])
    assert_agrees(scores.roll(-1, 1), recorded["box_scores"], "box_scores")
    assert_agrees(deltas[:, 4:], recorded["box_deltas"], "box_deltas")
    if detector.config.detector == "mask_rcnn":
        assert_agrees(heads.mask_roi_pool(pyramid, [BOXES])[:, ::32], recorded["mask_pooled"], "mask_pooled")
        masks = torch.stack(
            [heads._masks(pyramid, [BOXES], torch.full((4,), label + 1)) for label in range(0, 80, 8)], 1
        )
        assert_agrees(masks, recorded["mask_logits"], "mask_logits")


ARCHITECTURES = [pytest.param(name, marks=[pytest.mark.long] if "R_101" in name else []) for name in sorted(PARAMETERS)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_detectron2_models_compute_the_same(architecture):
    tensors = {name: torch.from_numpy(value) for name, value in checkpoint(architecture).items()}
    found = convert_detectron2(tensors)
    recorded = np.load(RECORDED / f"{architecture}.npz")
    assert found.report.complete and len(found.report.matched) == len(tensors) and not found.report.unexpected
    assert found.class_names[0] == "person" and found.class_names[-1] == "toothbrush" and len(found.class_names) == 80
    assert found.detector.config.backbone == ("resnet101" if "101" in architecture else "resnet50")
    with torch.no_grad():
        pyramid = found.detector.features(our_images())
        first = 3 if "retinanet" in architecture else 2
        for number, level in enumerate(pyramid, start=first):
            assert_agrees(level[0, ::16], recorded[f"feature_p{number}"], f"feature_p{number}")
        check = assert_retinanet_agrees if "retinanet" in architecture else assert_two_stage_agrees
        check(found.detector, pyramid, recorded)


# the same weights with fewer channels, so that whole files are quick


def small(architecture="retinanet_R_50_FPN_1x", **changes):
    """Every tensor of an architecture, cut down to one cell of its kernels: for files that must be refused."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in PARAMETERS[architecture].items()}
    return {name: value for name, value in (tensors | changes).items() if value is not None}


def write_pickle(path, tensors, **options):
    content = {"model": tensors, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(content, **options))
    return path


def test_zoo_file_becomes_a_teacher(tmp_path, capsys, shown):
    tensors = checkpoint("retinanet_R_50_FPN_1x")
    file = write_pickle(tmp_path / "model_final_bfca0b.pkl", tensors, protocol=4)
    out = tmp_path / "teachers/student.safetensors"
    assert main(["convert", str(file), "--out", str(out)]) == 0
    assert shown["convert"][0] == "files"
    said = capsys.readouterr().err
    assert "detectron2's retinanet with resnet50, 80 classes" in said and "matched 301 of 301 tensors" in said
    assert "BGR to RGB" in said and "needs: --detector.p6-source c5 --detector.no-anchor-rounding\n" in said
    detector, names = load_detector(out)
    assert names[:2] == ["person", "bicycle"] and detector.config.stride_in_1x1
    expected = torch.from_numpy(tensors["backbone.bottom_up.stem.conv1.weight"][:, ::-1].copy()) * STD_RGB
    assert torch.equal(detector.backbone.conv1.weight, expected)


TORCHVISION = ("retinanet", "retinanet_v2", "faster_rcnn", "mask_rcnn")


def torchvision_model(kind, classes):
    """As torchvision builds its published ones (frozen norms, but in the second version), with drawn numbers."""
    torch.manual_seed(3)
    if kind == "retinanet_v2":
        build = detection.retinanet_resnet50_fpn_v2
        model = build(weights=None, weights_backbone=None, num_classes=classes)
    else:
        backbone = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        dense = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if kind == "retinanet" else {}
        backbone = detection.backbone_utils._resnet_fpn_extractor(backbone, 3, **dense)
        kinds = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
        model = kinds[kind](backbone, classes)
    for name, value in model.state_dict().items():
        if "running" in name or (".bn" in name and not name.endswith("tracked")):
            value.copy_(torch.rand(value.shape) * 0.2 + 0.9)
    return model.eval()


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision_models_detect_the_same(kind):
    model = torchvision_model(kind, 4)
    found = convert_torchvision(model.state_dict(), ["a", "b", "c"])
    assert found.report.complete and found.class_names == ["a", "b", "c"]
    config = found.detector.config
    assert (config.norm, config.head_norm, config.p6_source) == (
        ("bn", "gn", "c5") if kind.endswith("v2") else ("frozen_bn", "none", "p5")
    )
    images = torch.randn(1, 3, 128, 192)
    pad = Batch(images, torch.tensor([[128, 192]]), *[torch.zeros(0)] * 3, counts=[0])
    with torch.no_grad():
        theirs = list(model.backbone(images).values())
        ours = found.detector.features(images)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        if "retinanet" in kind:
            expected, got = model.head(theirs), found.detector.head(ours)
            logits = expected["cls_logits"][..., 1:]
            torch.testing.assert_close(got["cls_logits"], logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
            return
        rpn = found.detector.head.rpn
        proposals = rpn.proposals(rpn(ours), pad, pre_nms=50, post_nms=20)
        shapes = [(128, 192)]
        pooled = model.roi_heads.box_roi_pool(dict(zip("0123", theirs)), proposals, shapes)
        logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
        got_logits, got_deltas = found.detector.head.roi_heads._boxes(ours, proposals)
        torch.testing.assert_close(got_logits, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
        torch.testing.assert_close(got_deltas, deltas, rtol=1e-3, atol=1e-3 * float(deltas.abs().max()))


def test_published_torchvision_files(tmp_path):
    """91 rows become 80 classes, the old names of the files are known, and eps 0 of their norms is kept."""
    model = torchvision_model("faster_rcnn", 91)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0
            module.running_var.mul_(1e-5)
            module.weight.mul_(3e-3)
    tensors = {
        name.replace("rpn.head.conv.0.0.", "rpn.head.conv.").replace("_blocks.0.0.", "_blocks.0."): value
        for name, value in model.state_dict().items()
    }
    assert "rpn.head.conv.weight" in tensors and "backbone.fpn.inner_blocks.0.weight" in tensors
    torch.save(tensors, tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    found = convert_checkpoint(tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    rows = found.detector.head.roi_heads.box_predictor.cls_score.weight
    theirs = model.roi_heads.box_predictor.cls_score.weight
    assert rows.shape[0] == 81 and torch.equal(rows[0], theirs[0]) and torch.equal(rows[12], theirs[13])
    assert torch.equal(rows[80], theirs[90]) and found.class_names[11] == "stop sign"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(found.detector.features(images), model.backbone(images).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    kept = convert_torchvision(tensors, norm_eps=1e-5).detector.backbone.bn1.weight
    assert torch.equal(kept, tensors["backbone.body.bn1.weight"])


def test_old_retinanet_names():
    tensors = torchvision_model("retinanet", 91).state_dict()
    old = {}
    for name, value in tensors.items():
        for i in range(4):
            name = name.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.") if f"_head.conv.{i}.0." in name else name
        old[name] = value
    found = convert_torchvision(old)
    logits = found.detector.head.classification_head.cls_logits.weight
    theirs = tensors["head.classification_head.cls_logits.weight"].view(9, 91, 256, 3, 3)
    assert torch.equal(logits.view(9, 80, 256, 3, 3)[:, -1], theirs[:, 90])
    ninety = convert_torchvision(old, [f"class {i}" for i in range(90)]).detector.head.classification_head.cls_logits
    assert torch.equal(ninety.weight.view(9, 90, 256, 3, 3), theirs[:, 1:])
    for i in range(4):
        one = found.detector.state_dict()[f"head.regression_head.conv.{i}.0.weight"]
        assert torch.equal(one, tensors[f"head.regression_head.conv.{i}.0.weight"])


def test_classes_of_other_data(tmp_path, capsys):
    """The names come from an annotation file; without one, or with too few, nothing is guessed."""
    model = torchvision_model("retinanet", 4)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    arguments = ["convert", str(tmp_path / "mine.pth"), "--out", str(tmp_path / "out.safetensors")]
    assert main(arguments) == 2 and "pass --annotations" in capsys.readouterr().err
    names = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in ((9, "c"), (2, "a"), (4, "b"))],
    }
    (tmp_path / "a.json").write_text(json.dumps(names))
    assert main([*arguments, "--annotations", str(tmp_path / "a.json")]) == 0
    assert load_detector(tmp_path / "out.safetensors")[1] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="class names must be the 3"):
        convert_torchvision(model.state_dict(), ["a"])


BLOCKS = {f"backbone.bottom_up.res4.{i}.conv3.weight": None for i in range(3, 6)}
WRONG = [
    (
        "fpn",
        {f"backbone.fpn_output{i}.{end}": None for i in (3, 4, 5) for end in ("weight", "bias")},
        "feature pyramid",
    ),
    ("depth", BLOCKS, "ResNet-50 or -101, got a third stage of 3"),
    ("missing", {"head.bbox_pred.weight": None}, "missing: head.regression_head.bbox_reg.weight"),
    ("shape", {"head.bbox_pred.weight": np.zeros((12, 256, 3, 3), np.float32)}, r"needs \[36, 256, 3, 3\]"),
    ("scalar", {"head.cls_score.bias": np.zeros((), np.float32)}, "must hold head.classification_head.cls_logits"),
    ("unknown", {"head.ctrness.weight": np.zeros(3, np.float32)}, "not used: head.ctrness.weight"),
    ("classes", {"head.cls_score.bias": np.zeros(27, np.float32)}, "3 classes are not COCO's"),
    ("input", {"pixel_std": np.array([58.395, 57.12, 57.375], np.float32)}, "pixel_std"),
    ("keypoints", {"roi_heads.keypoint_head.score_lowres.weight": np.zeros(3, np.float32)}, "keypoint_head"),
    ("infinite", {"head.bbox_pred.bias": np.full(36, np.inf, np.float32)}, "must be finite"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_models_are_refused(changes, message):
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in small(**changes).items()}
    with pytest.raises(ValueError, match=message):
        convert_detectron2(tensors)


@pytest.mark.parametrize("name", ["classifier.pth", "empty.pth", "text.pkl", "numbers.pkl", "weights.bin"])
def test_wrong_files_are_refused(tmp_path, name, capsys):
    path = tmp_path / name
    if name == "classifier.pth":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    elif name == "numbers.pkl":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        path.write_bytes(b"no weights here")
    assert main(["convert", str(path), "--out", str(tmp_path / "out.safetensors")]) == 2
    message = capsys.readouterr().err
    assert path.name in message and message.count("\n") == 1 and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("changes", [{"stride_in_1x1": True}, {"p6_source": "c5", "detector": "faster_rcnn"}], ids=str)
def test_options_where_they_mean_nothing(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        DetectorConfig(**{"backbone": "resnet18", **changes})


def test_aligned_pooling_and_exact_anchors_train():
    """The options of converted detectors work in training, too, and an anchor that is not rounded stays so."""
    config = DetectorConfig(
        detector="faster_rcnn", num_classes=2, backbone="resnet18", width=0.125, channels=32, box_head_channels=16,
        roi_aligned=True, anchor_rounding=False, roi_samples=8, rpn_post_nms_train=20,
    )  # fmt: skip
    detector = build_detector(config)
    assert float(detector.imitation_anchors()[0][0, 0]) == pytest.approx(-16 * 2**0.5)
    boxes = torch.tensor([[4.0, 4, 40, 40]])
    batch = Batch(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]), boxes, torch.tensor([1]), torch.tensor([0]), [1])
    sum(detector.loss(detector.features(batch.images), batch).values()).backward()
    assert detector.head.roi_heads.box_head.fc6.weight.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
