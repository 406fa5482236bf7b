"""Distillation inside Ultralytics by a trainer class: YOLOv8, 11 and 26 on generated pictures, no downloads."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_cases import detector

ultralytics = pytest.importorskip("ultralytics", reason="ultralytics cannot be imported", exc_type=ImportError)

from ultralytics import YOLO  # noqa: E402

from fastkd.integrations.ultralytics import attach  # noqa: E402

CLASSES = 3
KINDS = ["yolov8n", "yolo11n", "yolo26n"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pictures of coloured rectangles in Ultralytics' format."""
    root, draw = tmp_path_factory.mktemp("yolo"), np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(8):
            picture, lines = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8), []
            for label in range(CLASSES):
                x, y, w, h = draw.uniform([0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.5, 0.5])
                lines.append(f"{label} {x:.4f} {y:.4f} {w:.4f} {h:.4f}")
                rows, columns = (slice(int(64 * (c - s / 2)), int(64 * (c + s / 2))) for c, s in ((y, h), (x, w)))
                picture[rows, columns, label] = 255
            Image.fromarray(picture).save(root / "images" / split / f"{index}.png")
            (root / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
    names = "".join(f"  {label}: c{label}\n" for label in range(CLASSES))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return root / "data.yaml"


def yolo(kind, seed=0, scale=1):
    torch.manual_seed(seed)
    model = YOLO(f"{kind}.yaml" if scale == 1 else f"{kind[:-1]}s.yaml")
    model.overrides["pretrained"] = False
    return model


def settings(data, folder, **options):
    return {
        "data": str(data), "epochs": 2, "imgsz": 64, "batch": 4, "nbs": 4, "workers": 0, "plots": False, "amp": False,
        "device": "cpu", "project": str(folder), "name": "run", "exist_ok": True, "verbose": False, "val": False,
        "optimizer": "SGD", "lr0": 0.001, "warmup_epochs": 0, "seed": 1, "cache": False,
    } | options  # fmt: skip


def teacher_of(kind):
    teacher = yolo(kind, 1, 2)
    teacher.model = ultralytics.nn.tasks.DetectionModel(teacher.model.yaml, nc=CLASSES, verbose=False)
    return teacher


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_a_trainer_class_distils(kind, method, data, tmp_path):
    kd = attach(yolo(kind), method, teacher=None if method == "lgd" else teacher_of(kind), detach_steps=0)
    seen = []

    def note(trainer):
        network = kd.attachment.model
        reached = [p.grad is not None for p in kd.attachment.distillation.network.parameters()]
        seen.append((network.criterion.__class__.__name__, dict(trainer.loss_items), any(reached)))

    student = yolo(kind)
    student.add_callback("on_train_batch_end", note)
    student.train(trainer=kd.trainer, **settings(data, tmp_path, epochs=1))
    assert kd.state.steps == 2 and kd.state.computed == 2 and not kd.state.attached
    assert seen[0][0] == ("E2ELoss" if kind == "yolo26n" else "v8DetectionLoss")
    wanted = {"icd": ["icd_identification", "icd_localisation", "icd_distill"], "lgd": ["lgd_distill", "lgd_loss"]}
    for name in wanted[method]:
        assert np.isfinite(float(seen[-1][1][name])) and float(seen[-1][1][name]) > 0
    assert kd.attachment.distillation.network.spec.student == (64, 128, 256)
    norms = kd.attachment.distillation.probe.norms[f"{method}_distill"]
    assert all(float(norm) > 0 for norm in norms)
    assert len(student(np.zeros((64, 64, 3), np.uint8), verbose=False)) == 1
    header = (tmp_path / "run" / "results.csv").read_text().splitlines()[0]
    assert f"train/{method}_distill" in header


class Interrupted(Exception):
    pass


def test_an_interrupted_run_resumes_and_its_files_do_not_know_us(data, tmp_path):
    kd = attach(None, "icd", teacher=teacher_of("yolo11n"), detach_steps=0)
    student = yolo("yolo11n")

    def interrupt(trainer):
        raise Interrupted

    student.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        student.train(trainer=kd.trainer, **settings(data, tmp_path))
    weights = tmp_path / "run" / "weights"
    hooks = [hook for part in YOLO(weights / "last.pt").model.modules() for hook in part._forward_hooks.values()]
    assert not any("fastkd" in repr(hook) for hook in hooks) and b"fastkd" not in (weights / "last.pt").read_bytes()
    saved = torch.load(weights / "fastkd.pt", weights_only=True)
    assert saved["steps"] == 2
    again = attach(None, "icd", teacher=teacher_of("yolo11n"), detach_steps=0)
    YOLO(weights / "last.pt").train(resume=True, trainer=again.trainer)
    assert again.state.steps == 4 and again.state.computed == 4


def test_compile_true_compiles_the_layers(data, tmp_path, monkeypatch):
    """The calls of torch.compile are recorded and compile nothing; test_properties.py traces the layers."""
    compiled = []

    def record(call, mode):
        compiled.append(mode)
        return call

    monkeypatch.setattr(torch, "compile", record)
    kd = attach(None, "icd", teacher=teacher_of("yolo11n"), detach_steps=0)
    student = yolo("yolo11n")
    student.train(trainer=kd.trainer, **settings(data, tmp_path, epochs=1, compile=True))
    assert kd.state.steps == 2 and kd.state.losses["icd_distill"] > 0
    assert compiled == ["default"] * (len(student.model.model) - 1)
    assert YOLO(tmp_path / "run" / "weights" / "last.pt").model.model[0]._compiled_call_impl is None


def test_a_torchvision_detector_teaches(data, tmp_path):
    teacher = detector("retinanet", channels=64, classes=CLASSES).eval()
    kd = attach(None, "icd", teacher=teacher, detach_steps=0)
    yolo("yolo11n").train(trainer=kd.trainer, **settings(data, tmp_path, epochs=1))
    assert kd.attachment.distillation.network.spec.pairs == ((0, 0), (1, 1), (2, 2))
    assert kd.state.steps == 2 and "the teacher finds" in kd.report()


def test_bad_input(data, tmp_path):
    with pytest.raises(ValueError, match="num_classes must be that of the data, 3, got 7"):
        yolo("yolo11n").train(trainer=attach(None, "lgd", num_classes=7).trainer, **settings(data, tmp_path))
    with pytest.raises(TypeError, match="must be an Ultralytics detection network, got Linear"):
        attach(None, "lgd").start(torch.nn.Linear(1, 1), 3)
