"""Trains the weight files of fastkd/assets: `python -m benchmarks.study.assets` (an hour or more on two cores).

Trains, resumably, in runs/assets: the students' backbone on scenes not used by the study (seed 1); on the study's
training images the teachers' backbone, and from it the RetinaNet, FCOS and Faster R-CNN teachers. Then stores them in
half precision, each with a JSON file (steps, seconds, AP, command, commit), and writes SHA256SUMS. The same commit,
seed, thread count and machine type give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastkd.assets import FOLDER
from fastkd.detectors import load_detector, save_detector
from fastkd.files import write_json

# In order; each is also the name of a recipe. The teachers' backbone is not shipped, as it is part of the teachers.
RUNS = (
    "scenes-resnet18-backbone",
    "scenes-resnet34-backbone",
    "scenes-retinanet-teacher",
    "scenes-fcos-teacher",
    "scenes-faster-rcnn-teacher",
)
NOT_SHIPPED = ("scenes-resnet34-backbone",)
DATA = {"data/scenes": (8000, 500, 0), "data/scenes-pretrain": (8000, 300, 1)}  # folder -> train, val, seed


def fastkd(*args: str) -> None:
    """Run a fastkd command in a separate process."""
    print("fastkd", *args, flush=True)
    subprocess.run([sys.executable, "-m", "fastkd.cli", *args], check=True)


def pack(name: str, run_dir: Path) -> None:
    """Store a finished run as the asset `name`."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    weights, target = run_dir / "student.safetensors", FOLDER / f"{name}.safetensors"
    if name.endswith("backbone"):
        tensors = {n.removeprefix("backbone."): t for n, t in load_file(weights).items() if n.startswith("backbone.")}
        halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(halves, target, metadata={"recipe": metrics["name"]})
    else:
        detector, class_names = load_detector(weights)
        save_detector(detector, target, class_names, dtype=torch.float16)
    kept = ("name", "steps", "batch_size", "seed", "seconds", "parameters", "torch", "commit")
    facts = {key: metrics[key] for key in kept} | {"command": f"python -m benchmarks.study.assets --only {name}"}
    facts |= {"AP": metrics["bbox"]["AP"], "AP50": metrics["bbox"]["AP50"]}
    write_json(target.with_suffix(".json"), facts)


def write_checksums() -> None:
    """SHA256SUMS of every weight file in the folder."""
    files = sorted(FOLDER.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (FOLDER / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train missing runs and pack all assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="assets to make")
    chosen = parser.parse_args().only
    for root, (train, val, seed) in DATA.items():
        fastkd("data", "scenes", "--root", root, "--train", str(train), "--val", str(val), "--seed", str(seed))
    for name in chosen:
        run_dir = Path("runs/assets") / name
        backbone = run_dir.with_name("scenes-resnet34-backbone") / "student.safetensors"
        start = ["--backbone-weights", str(backbone)] if name.endswith("teacher") else []
        fastkd("train", name, "--run-dir", str(run_dir), "--resume", *start)
        if name not in NOT_SHIPPED:
            pack(name, run_dir)
    write_checksums()


if __name__ == "__main__":
    main()
