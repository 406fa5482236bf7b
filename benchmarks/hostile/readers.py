"""The readers of untrusted files, each with intact files to mutate and the function that reads the result."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.hostile import grammar
from fastkd.commands.train import find_recipe
from fastkd.data import CocoDataset, CrowdHumanDataset
from fastkd.data.images import read_image, read_size
from fastkd.detectors import DetectorConfig, build_detector, convert_checkpoint, load_detector, save_detector
from fastkd.detectors.weights.convert import read_tensors
from fastkd.detectors.weights.files import read_state_dict
from fastkd.evaluation import evaluator_of
from fastkd.report import numbers
from fastkd.report.runs import load_run
from fastkd.training import get_recipe
from fastkd.training.run.logging import RunLog

PICTURE = 1000  # MB that a picture may take: ten bytes for each of 100 million pixels, with which it is still read


@dataclass(frozen=True)
class Reader:
    """One reader.

    Args:
        name: in the table.
        what: description for the page.
        path: name of the file in the folder.
        make: writes what the reader needs besides into a folder and returns the intact content.
        mutate: a mutated file from the random numbers, the intact content and the path of a mark that its code, if it
            ran, would make.
        read: reads the file; raises ValueError or OSError with its path in the message, or returns.
        megabytes: the most memory that a case may take.
    """

    name: str
    what: str
    path: str
    make: Callable[[Path], bytes]
    mutate: Callable[[random.Random, bytes, str], bytes]
    read: Callable[[Path], None]
    megabytes: int = 600


def _pictures(folder: Path) -> None:
    for name, size in (("a.png", (10, 8)), ("b.jpg", (12, 6))):
        Image.new("RGB", size, (9, 80, 200)).save(folder / name)
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())


def coco(folder: Path) -> bytes:
    """Two images with polygons, run lengths and a crowd region."""
    _pictures(folder)
    shapes = [[[1, 1, 5, 1, 5, 5]], {"size": [8, 10], "counts": [3, 5, 72]}, {"size": [8, 10], "counts": ":n0X1"}]
    annotations = [
        {"id": k + 1, "image_id": 1, "category_id": 1 + k % 2, "bbox": [1 + k, 1, 4, 4.5], "area": 9.5, "iscrowd": 0}
        for k in range(3)
    ]
    for annotation, shape in zip(annotations, shapes):
        annotation["segmentation"] = shape
    annotations.append({"id": 9, "image_id": 2, "category_id": 2, "bbox": [0, 0, 6, 6], "iscrowd": 1})
    images = [
        {"id": 1, "file_name": "a.png", "width": 10, "height": 8},
        {"id": 2, "file_name": "b.jpg", "width": 12, "height": 6},
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()


def read_coco(path: Path) -> None:
    """Opens the data set, with masks if it has them; decodes every image and mask; evaluates no detections."""
    try:
        data = CocoDataset(path, path.parent, with_masks=True)
    except ValueError:
        data = CocoDataset(path, path.parent)
    for index in range(len(data)):
        boxes, labels, ignored = data.targets(index)
        assert np.isfinite(boxes).all() and np.isfinite(ignored).all() and (labels < data.num_classes).all()
        if data.with_masks:
            data.masks(index, (16, 16))
        data.read_image(index)
    evaluator = evaluator_of(data)
    evaluator._masks = data.with_masks  # without a detector that gives any
    evaluator.compute()


def odgt(folder: Path) -> bytes:
    """Two lines, one with an ignored box and one without boxes."""
    _pictures(folder)
    Image.new("RGB", (20, 16)).save(folder / "one.jpg")
    Image.new("RGB", (20, 16)).save(folder / "two.jpg")
    box = {
        "tag": "person",
        "fbox": [1, 1, 9, 12],
        "vbox": [1, 1, 8, 9],
        "hbox": [2, 1, 3, 3],
        "head_attr": {"ignore": 0},
    }
    mask = {"tag": "mask", "fbox": [3, 3, 5, 5], "extra": {"ignore": 1}}
    lines = [{"ID": "one", "gtboxes": [box | {"extra": {"box_id": 0}}, mask]}, {"ID": "two", "gtboxes": []}]
    return b"\n".join(json.dumps(line).encode() for line in lines)


def mutate_lines(rng: random.Random, content: bytes, _: str) -> bytes:
    """Mutates one line of a file of JSON lines, or its bytes."""
    lines = content.split(b"\n")
    if rng.random() < 0.15:
        return grammar.mutate_bytes(rng, content)
    where = rng.randrange(len(lines))
    lines[where] = grammar.json_text(rng, json.loads(lines[where]))
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"\n".join(lines)


def read_odgt(path: Path) -> None:
    """Opens the data set, decodes every image, evaluates no detections."""
    data = CrowdHumanDataset(path, path.parent)
    for index in range(len(data)):
        assert np.isfinite(data.targets(index)[0]).all() and np.isfinite(data.truth(index)[0]).all()
        data.read_image(index)
    evaluator_of(data).compute()


def _tiny() -> DetectorConfig:
    return DetectorConfig("retinanet", 2, "resnet18", width=0.125, channels=16, head_convs=1)


def safetensors(folder: Path) -> bytes:
    """A tiny detector as fastkd writes it."""
    torch.manual_seed(0)
    save_detector(build_detector(_tiny()), folder / "intact.safetensors", ["cat", "dog"])
    return (folder / "intact.safetensors").read_bytes()


def read_safetensors(path: Path) -> None:
    """As a detector of ours, which is the stricter way, and as a plain state dict."""
    read_state_dict("hostile", path)
    load_detector(path)


def detectron2(folder: Path) -> bytes:
    """Arrays under detectron2's names; far too few for a detector."""
    rng = np.random.default_rng(0)
    names = ("backbone.bottom_up.stem.conv1.weight", "backbone.fpn_lateral3.weight", "head.cls_score.weight")
    arrays: dict[str, Any] = {name: rng.standard_normal((2, 3, 2)).astype(np.float32) for name in names}
    arrays["order"] = np.asfortranarray(arrays[names[0]].astype(">f8"))
    return pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, protocol=2)


def read_checkpoint(path: Path) -> None:
    """The tensors, and `fastkd convert`, which says of such a file's few names that they are no detector it knows."""
    for tensor in read_tensors(path).values():
        tensor.double().sum().item()
    try:
        convert_checkpoint(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise


def torchvision(folder: Path) -> bytes:
    """Tensors under torchvision's names, as torch.save writes them."""
    names = ("backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight", "head.classification_head.x.bias")
    out = io.BytesIO()
    torch.save({"model": {name: torch.randn(2, 3, 2) for name in names}, "epoch": 3}, out)
    return out.getvalue()


def picture(kind: str) -> Callable[[Path], bytes]:
    """A function that encodes a picture of 40 x 30 pixels."""

    def make(_: Path) -> bytes:
        pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
        out = io.BytesIO()
        options = {"progressive": True} if kind == "JPEG" else {}
        Image.fromarray(pixels).save(out, kind, **options)
        return out.getvalue()

    return make


def read_picture(path: Path) -> None:
    """Size and pixels."""
    size = read_size(str(path))
    assert read_image(str(path), size).shape == (size[1], size[0], 3)


def recipe(_: Path) -> bytes:
    """The recipe of a run with a method and a teacher."""
    return json.dumps(get_recipe("scenes-retinanet-icd").to_dict()).encode()


def read_recipe(path: Path) -> None:
    """As `fastkd train recipe.json`, and its stored form."""
    json.dumps(find_recipe(str(path)).to_dict())


def log(folder: Path) -> bytes:
    """Six lines of a run's log; beside it the other files of a run directory."""
    (folder / "recipe.json").write_bytes(recipe(folder))
    lines = []
    for step in range(1, 7):
        line: dict[str, Any] = {
            "step": step,
            "loss": 1.5 / step,
            "losses": {"classification": 0.5},
            "lr": {"student": 0.01},
        }
        lines.append(line | ({"bbox": {"AP": 3.0 * step}} if step % 3 == 0 else {"grad_norm": {"student": 2.0}}))
    return b"\n".join(json.dumps(line).encode() for line in lines)


def read_log(path: Path) -> None:
    """As the report reads it, and as a resumed run does."""
    run = load_run(path.parent)
    for steps, values in numbers.curve_points(run).values():
        assert np.isfinite(steps).all() and np.isfinite(values).all()
    log = RunLog.__new__(RunLog)  # without the TensorBoard writer
    log.path, log.evaluated = path, False
    log._drop_after(4)


def _json(rng: random.Random, content: bytes, _: str) -> bytes:
    return grammar.json_text(rng, json.loads(content))


READERS = (
    Reader("coco", "COCO JSON: data set with masks, images, ground truth", "file.json", coco, _json, read_coco),
    Reader("odgt", "CrowdHuman's odgt: data set, images, ground truth", "file.odgt", odgt, mutate_lines, read_odgt),
    Reader(
        "safetensors", "detector file and state dict", "file.safetensors", safetensors,
        lambda rng, content, _: grammar.safetensors(rng, content), read_safetensors,
    ),
    Reader("detectron2", "`fastkd convert` of a pickle", "file.pkl", detectron2, grammar.pickled, read_checkpoint),
    Reader(
        "torchvision", "`fastkd convert` of a torch.save file", "file.pth", torchvision,
        lambda rng, content, mark: grammar.zipped(rng, content, lambda r, data: grammar.pickled(r, data, mark)),
        read_checkpoint,
    ),
    Reader(
        "jpeg", "size and pixels", "file.jpg", picture("JPEG"),
        lambda rng, content, _: grammar.jpeg(rng, content), read_picture, PICTURE,
    ),
    Reader(
        "png", "size and pixels", "file.png", picture("PNG"),
        lambda rng, content, _: grammar.png(rng, content), read_picture, PICTURE,
    ),
    Reader("recipe", "`fastkd train recipe.json`", "file.json", recipe, _json, read_recipe),
    Reader("log", "a run's log.jsonl, by the report and by a resumed run", "log.jsonl", log, mutate_lines, read_log),
)  # fmt: skip
