"""Tiny data and recipes for the tests of the trainer: a run takes about a second."""

import dataclasses
import io
import json
from pathlib import Path

import torch
from draws import some
from rich.console import Console
from safetensors.torch import load_file

from fastkd.data import generate_scenes
from fastkd.detectors import DetectorConfig, build_detector, save_detector
from fastkd.training import DataConfig, OptimizerConfig, Recipe, RuntimeConfig, Schedule, get_recipe

KINDS = {
    "retinanet": "retinanet",
    "fcos": "fcos",
    "atss": "atss",
    "poto": "poto",
    "condinst": "condinst",
    "solov2": "solov2",
    "faster-rcnn": "faster_rcnn",
    "mask-rcnn": "mask_rcnn",
}
CLASSES = 10


def tiny_detector(kind: str, **changes) -> DetectorConfig:
    """A detector of a few thousand weights. Args: kind: as in recipe names."""
    settings = {
        "detector": KINDS[kind],
        "num_classes": CLASSES,
        "backbone": "resnet18",
        "width": 0.125,
        "channels": 32,
        "norm": "bn",
        "head_convs": 1,
        "box_head_channels": 32,
        "mask_head_channels": 16,
        "mask_branch_channels": 16,
        "instance_head_channels": 16,
        "kernel_channels": 16,
        "grids": (8, 6, 4, 3, 2),
        "rpn_post_nms_train": 40,
        "rpn_post_nms_test": 20,
        "roi_samples": 32,
        "rpn_samples": 32,
        "candidates_per_level": 50,
        "detections_per_image": 10,
    }
    return DetectorConfig(**{**settings, **changes})


def tiny_recipe(data: Path, kind: str = "retinanet", method: str = "baseline", **changes) -> Recipe:
    """A scenes recipe made tiny; `changes` replace fields of the recipe."""
    recipe = get_recipe(f"scenes-{kind}-{method}")
    settings = {
        "detector": tiny_detector(kind),
        "data": DataConfig(
            root=str(data), short_sides=(48, 64), val_short_side=64, max_side=96, val_batch_size=4, workers=0
        ),
        "teacher": str(teacher_file(data, kind)) if recipe.teacher else None,
        "backbone_weights": None,
        "optimizer": OptimizerConfig(learning_rate=0.02, clip_norm=10.0, warmup=0.1),
        "method_optimizer": recipe.method_optimizer if method == "icd" else None,
        "schedule": Schedule(steps=6, batch_size=2),
        "runtime": RuntimeConfig(precision="float32", log_every=2, checkpoint_every=4, ledger_pairs=0),
    }
    return dataclasses.replace(recipe, **{**settings, **changes})


def some_recipes(names: list[str], test: str) -> list:
    """Recipes for pytest.mark.parametrize: some with every family, detector, backbone and method, the others long."""

    def parts(case):
        (name,) = case
        words, detector = name.split("-"), get_recipe(name).detector
        return words[0], detector.detector, (detector.backbone, detector.deformable), words[-1]

    return some([(name,) for name in names], parts, test)


def teacher_file(data: Path, kind: str) -> Path:
    """An untrained teacher with a wider backbone than the student's."""
    path = data.with_name(f"{data.name}-teacher-{kind}.safetensors")
    if not path.exists():
        torch.manual_seed(7)
        names = [c["name"] for c in json.loads((data / "annotations/train.json").read_text())["categories"]]
        save_detector(build_detector(tiny_detector(kind, width=0.25)), path, names)
    return path


def silent() -> Console:
    """A console that keeps what is printed: console.file.getvalue()."""
    return Console(file=io.StringIO(), width=200)


def everything(run_dir: Path) -> dict:
    """The data that two equal runs must share: weights, optimiser states, logs without their times, detections."""
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    found = {"newest": newest.name}
    for name in ("model", "optimizer"):
        found |= {f"{name}:{k}": v for k, v in load_file(newest / f"{name}.safetensors").items()}
    for name in ("student", "method"):
        file = run_dir / f"{name}.safetensors"
        if file.exists():
            found |= {f"{name} file:{k}": v for k, v in load_file(file).items()}
    timed = ("images_per_second", "seconds_per_step", "data_seconds", "data_wait", "loader_images_per_second")
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    found["detections"] = json.loads((run_dir / "detections.json").read_text())
    return found


def assert_same_run(one: dict, other: dict) -> None:
    """Equality to the last bit of what `everything` gave."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if hasattr(value, "numpy"):
            assert value.dtype == other[name].dtype and value.numpy().tobytes() == other[name].numpy().tobytes(), name
        else:
            assert value == other[name], name


def make_tiny_data(tmp_path_factory) -> Path:
    """Two dozen scenes, generated once for all test files."""
    root = tmp_path_factory.getbasetemp() / "tiny-scenes"
    generate_scenes(root, train=20, val=6, seed=3, processes=1)
    return root
