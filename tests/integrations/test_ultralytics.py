"""Distillation inside Ultralytics by a trainer class: YOLOv8, 11 and 26 on generated pictures, no downloads."""

import csv
import shutil

import numpy as np
import pytest
import torch
from host_cases import HOSTS
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
    for name in ("last.pt", "best.pt"):
        modules = list(YOLO(weights / name).model.modules())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in modules)
        assert not any(part._forward_hooks_with_kwargs or part._forward_pre_hooks_with_kwargs for part in modules)
        content = (weights / name).read_bytes()
        assert not any(word in content for word in (b"fastkd", b"nullcontext", b"contextlib"))
    saved = torch.load(weights / "fastkd.pt", weights_only=True)
    assert saved["steps"] == 2
    shutil.copytree(weights, tmp_path / "moved")
    (weights / "fastkd.pt").unlink()
    again = attach(None, "icd", teacher=teacher_of("yolo11n"), detach_steps=0)
    YOLO(tmp_path / "moved" / "last.pt").train(resume=True, trainer=again.trainer)
    assert again.state.steps == 4 and again.state.computed == 4


def test_resuming_without_our_file(data, tmp_path):
    """A warning names it; `load` before training gives another one."""

    def interrupt(trainer):
        raise Interrupted

    student = yolo("yolo11n")
    student.add_callback("on_model_save", interrupt)
    kd = attach(None, "lgd", detach_steps=0)
    with pytest.raises(Interrupted):
        student.train(trainer=kd.trainer, **settings(data, tmp_path))
    weights = tmp_path / "run" / "weights"
    shutil.copy(weights / "last.pt", tmp_path / "last.pt")
    kd.save(tmp_path / "kept.pt")
    again = attach(None, "lgd", detach_steps=0)
    with pytest.warns(UserWarning, match=r"resumes at step 2, but there is no .*fastkd.pt: the method starts anew"):
        YOLO(tmp_path / "last.pt").train(resume=True, trainer=again.trainer)
    assert again.state.steps == 2
    again.load(tmp_path / "kept.pt")
    assert again.state.steps == 2
    later = attach(None, "lgd", detach_steps=0)
    later.load(tmp_path / "kept.pt")
    YOLO(tmp_path / "last.pt").train(resume=True, trainer=later.trainer)
    assert later.state.steps == 4


def test_the_table_of_results_keeps_its_columns(data, tmp_path):
    """A method that fails three times leaves zeros in its columns."""
    kd = attach(None, "lgd", detach_steps=0)

    def fail(trainer):
        if trainer.epoch == 1:
            kd.attachment._host_step = None

    student = yolo("yolo11n")
    student.add_callback("on_train_epoch_start", fail)
    with pytest.warns(UserWarning, match="the run goes on without distillation"):
        student.train(trainer=kd.trainer, **settings(data, tmp_path, epochs=4, val=True))
    with open(tmp_path / "run" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(None not in row and None not in row.values() for row in rows)
    assert float(rows[0]["train/lgd_distill"]) > 0 and float(rows[3]["train/lgd_distill"]) == 0
    assert all(float(rows[3][f"train/{name}_loss"]) > 0 for name in ("box", "cls"))


def test_the_words_of_every_host(data, tmp_path):
    kd = attach(None, "pkd", teacher=teacher_of("yolo11n"), detach_steps=0)
    for word in (kd.step, lambda: kd.save(tmp_path / "kd.pt")):
        with pytest.raises(RuntimeError, match=r"training has not begun; call model.train\(trainer=kd.trainer\) first"):
            word()
    kd.detach()
    made = HOSTS["ultralytics"]()
    model = made.model(0)
    kd.start(model, CLASSES)
    made.run(model)[0].backward()
    kd.step()
    kd.save(tmp_path / "kd.pt")
    assert kd.state.steps == 1
    again = attach(None, "pkd", teacher=teacher_of("yolo11n"))
    again.load(tmp_path / "kd.pt")
    again.start(made.model(0), CLASSES)
    assert again.state.steps == 1
    kd.detach()
    assert not kd.state.attached
    with pytest.raises(TypeError, match="priors must be a ClassPriors or None in this host, got list"):
        attach(None, "icd", teacher=teacher_of("yolo11n"), priors=[])


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
