"""Time and memory of the commands on large data: python -m benchmarks.load

Writes annotation files of a million boxes in 200,000 images, runs of a report and sets of detections into a temporary
folder, runs each command on them in a process of its own, and writes docs/results/load.md. Fails if a command takes
more time or memory than its limit. --only NAME ... runs some of the cases; the others keep their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import commit, machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "load.json"
CLASSES, SIDE = 80, 128
MANY_IMAGES, MANY_BOXES = 200_000, 1_000_000
FEW_IMAGES, FEW_BOXES = 5_000, 36_000  # as COCO's validation set
RUNS = 20
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # and the other sequences that a terminal hides


@dataclass(frozen=True)
class Row:
    """A measured case.

    Args:
        seconds: until what `what` says.
        mib: largest resident memory of the command's first process; loader processes are not counted.
        commit: that was measured.
    """

    name: str
    what: str
    seconds: float
    mib: float
    most_seconds: float
    most_mib: float
    commit: str

    @property
    def fits(self) -> bool:
        return self.seconds <= self.most_seconds and self.mib <= self.most_mib


def write_annotations(root: Path, split: str, images: int, boxes: int) -> None:
    """Writes an annotation file with random boxes; all its images are one grey picture."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (90, 90, 90)).save(folder / "grey.png")
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, SIDE // 2, (boxes, 2)), rng.integers(4, SIDE // 2, (boxes, 2))
    rows = np.concatenate([corners + 0.5, sides], axis=1).tolist()
    content = {
        "images": [{"id": i, "file_name": "grey.png", "width": SIDE, "height": SIDE} for i in range(1, images + 1)],
        "annotations": [
            {"id": k, "image_id": 1 + k % images, "category_id": k % CLASSES, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0}
            for k, box in enumerate(rows, start=1)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(CLASSES)],
    }  # fmt: skip
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def random_detections(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes xyxy, falling scores and labels of one image."""
    corners = rng.uniform(0, SIDE / 2, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, SIDE / 2, (count, 2))], axis=1)
    return boxes, np.sort(rng.random(count))[::-1], rng.integers(0, CLASSES, count)


def write_run(folder: Path, root: Path, split: str, images: int, detections: int, seed: int) -> None:
    """A finished run directory as the report reads it."""
    from fastkd.files import write_json, write_json_list
    from fastkd.training import get_recipe

    recipe = get_recipe("scenes-retinanet-baseline").to_dict() | {"seed": seed}
    data = {"root": str(root), "val_annotations": f"annotations/{split}.json", "val_images": split}
    recipe["data"] = recipe["data"] | data
    box = {"AP": 30.0 + seed, "AP50": 50.0, "AP75": 25.0, "APs": 20.0, "APm": 30.0, "APl": 40.0}
    names = [f"class {c}" for c in range(CLASSES)]
    per_class = {name: box | {"instances": 9} for name in names}
    metrics = {"bbox": box | {"images": images, "instances": 9, "per_class": per_class}, "steps": 600, "seed": seed}
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "metrics.json", metrics | {"seconds": 60.0})
    write_json(folder / "ledger.json", {})
    lines = (json.dumps({"step": step, "loss": 1.0 / step, "losses": {"box": 1.0 / step}}) for step in range(1, 30))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(seed)

    def items():
        for image_id in range(1, images + 1):
            boxes, scores, labels = random_detections(rng, detections)
            boxes[:, 2:] -= boxes[:, :2]
            for row, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
                yield {"image_id": image_id, "category_id": label, "bbox": row, "score": score}

    write_json_list(folder / "detections.json", items())


def measure_detections(root: Path, split: str, count: int) -> None:
    """In a process of its own: computes the metrics of `count` random detections an image and writes the detections."""
    from fastkd.data import CocoDataset
    from fastkd.evaluation import CocoEvaluator
    from fastkd.files import write_json_list
    from fastkd.types import Batch, Detections

    dataset = CocoDataset(root / "annotations" / f"{split}.json", root / split)
    evaluator, rng = CocoEvaluator(dataset, max_detections=(1, 10, max(count, 100))), np.random.default_rng(0)
    none = torch.zeros(0, dtype=torch.int64)
    for ids in np.array_split(dataset.image_ids, max(1, len(dataset) // 500)):
        found = []
        for _ in ids:
            boxes, scores, labels = random_detections(rng, count)
            found.append(Detections(*(torch.from_numpy(part.copy()) for part in (boxes, scores, labels))))
        sizes = torch.full((len(ids), 2), SIDE)
        images = torch.zeros(len(ids), 3, 1, 1)
        batch = Batch(images, sizes, torch.zeros(0, 4), none, none, [0] * len(ids), image_ids=ids.tolist())
        evaluator.add(batch, found)
    print("begin", flush=True)
    evaluator.compute()
    write_json_list(root / "found.json", evaluator.iterate_results())


def heed_interrupts() -> None:
    """Ctrl-C ends a command again, also where a shell in the background (`&`, nohup) has us ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def peak_memory(pid: int) -> float:
    """Largest resident memory of a process so far, MiB; 0 when it has ended.

    Not of its resource usage: that begins with the memory of the process that forked it.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except ProcessLookupError:
        found = None
    return int(found[1]) / 1024 if found else 0.0


def run(
    command: Sequence[str], *, begin: str | None = None, until: str | None = None, terminal: bool = False
) -> tuple[float, float]:
    """Runs a command and returns its seconds and its largest resident memory in MiB.

    Args:
        command: a Python module with arguments.
        begin: pattern in the output from which the seconds count; None counts from the start of the process.
        until: pattern in the output at which the seconds end and the command gets a Ctrl-C; None waits for its end.
        terminal: connect the output to a terminal.
    Raises: RuntimeError with the output if the command fails or ends before `until` appears.
    """
    parent, child = pty.openpty() if terminal else os.pipe()
    start = time.perf_counter()
    arguments = [sys.executable, "-m", *command]
    process = subprocess.Popen(
        arguments, stdout=child, stderr=child, cwd=ROOT, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    os.close(child)
    text, end, mib = "", None, 0.0
    while True:
        mib = max(mib, peak_memory(process.pid))
        if select.select([parent], [], [], 0.1)[0]:
            try:
                piece = os.read(parent, 65536)
            except OSError:
                piece = b""  # the end of a terminal
            if not piece:
                break
            text = COLOURS.sub("", text + piece.decode(errors="replace"))
        if begin is not None and re.search(begin, text):
            start, begin = time.perf_counter(), None
        if until is not None and end is None and re.search(until, text):
            end = time.perf_counter()
            process.send_signal(signal.SIGINT)
    process.wait()
    if (end is None and (until is not None or process.returncode)) or begin is not None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return (end or time.perf_counter()) - start, mib


def cases(root: Path) -> dict[str, tuple[str, float, float, Callable[[], tuple[float, float]]]]:
    """name -> (what the seconds are, most seconds, most MiB, how to measure)."""
    many = ["--data.root", str(root), "--device", "cpu", "--runtime.precision", "float32"]
    for split in ("train", "val"):
        many += [f"--data.{split}-annotations", "annotations/many.json", f"--data.{split}-images", "many"]
    weights = "asset:scenes-resnet18-backbone.safetensors"
    recipe = ["scenes-retinanet-lgd", *many, "--backbone-weights", weights]
    evaluated = [
        "--annotations",
        str(root / "annotations" / "many.json"),
        "--images",
        str(root / "many"),
        "--device",
        "cpu",
    ]

    def train() -> tuple[float, float]:
        command = ["fastkd.cli", "train", *recipe, "--run-dir", str(root / "run"), "--runtime.log-every", "1"]
        return run(command, until=r"step 1/")

    def evaluate() -> tuple[float, float]:
        from fastkd.detectors import DetectorConfig, build_detector, save_detector

        small = DetectorConfig(backbone="resnet18", width=0.25, channels=32, head_convs=1, num_classes=CLASSES)
        save_detector(build_detector(small), root / "detector.safetensors", [f"class {c}" for c in range(CLASSES)])
        command = ["fastkd.cli", "evaluate", str(root / "detector.safetensors"), *evaluated]
        return run(command, until=r"\d/[\d,]+ batches", terminal=True)

    def detections(split: str, count: int) -> Callable[[], tuple[float, float]]:
        return lambda: run(["benchmarks.load", "--detections", split, str(count), str(root)], begin="begin")

    def report(split: str, runs: int, images: int, count: int) -> Callable[[], tuple[float, float]]:
        def measure() -> tuple[float, float]:
            folders = [root / f"runs-{split}" / f"run{number}" for number in range(runs)]
            for number, folder in enumerate(folders):
                folder.mkdir(parents=True)
                write_run(folder, root, split, images, count, number)
            return run(["fastkd.cli", "report", *map(str, folders), "--out", str(root / "report.html")])

        return measure

    size, written = f"{MANY_IMAGES:,} images, {MANY_BOXES:,} boxes", "metrics and detections.json"
    few = f"{FEW_IMAGES:,} images, 500 detections each"
    one = f"{size}, one run of 10 detections an image"
    twenty = f"{RUNS} runs of {FEW_IMAGES:,} images, 100 detections each"
    return {
        "train": (f"{size}: to the end of the first step", 150, 3000, train),
        "doctor": (f"{size}: all checks", 200, 3000, lambda: run(["fastkd.cli", "doctor", *recipe])),
        "evaluate": (f"{size}: to the first batch", 60, 2000, evaluate),
        "metrics": (f"{size}, 10 detections an image: {written}", 900, 3500, detections("many", 10)),
        "metrics-500": (f"{few}: {written}", 300, 3000, detections("few", 500)),
        "report": (one, 300, 4000, report("many", 1, MANY_IMAGES, 10)),
        "report-20": (twenty, 300, 3000, report("few", RUNS, FEW_IMAGES, 100)),
    }


def page(rows: Sequence[Row]) -> str:
    """docs/results/load.md."""
    lines = [
        "# Large data: time and memory of the commands",
        "",
        "Command: `python -m benchmarks.load`, which fails where a limit is exceeded. Seconds include the start of",
        "Python and imports, except in the rows on metrics. Memory is the largest resident size of the first",
        "process, without its loader processes. The data are drawn with seed 0. One thread;",
        f"{machine(torch.device('cpu'))['cpu']}, with other work on the machine at the same time.",
        "",
        "| case | what | s | limit | MiB | limit | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time_cells = f"{row.seconds:.0f} | {row.most_seconds:.0f}"
        lines.append(
            f"| {row.name} | {row.what} | {time_cells} | {row.mib:,.0f} | {row.most_mib:,.0f} | {row.commit} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run")
    parser.add_argument("--detections", nargs=3, metavar=("SPLIT", "COUNT", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.detections:
        split, count, root = arguments.detections
        return measure_detections(Path(root), split, int(count))
    old = {row["name"]: Row(**row) for row in (json.loads(RESULTS.read_text()) if RESULTS.is_file() else [])}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_annotations(root, "many", MANY_IMAGES, MANY_BOXES)
        write_annotations(root, "few", FEW_IMAGES, FEW_BOXES)
        known = cases(root)
        unknown = set(arguments.only or ()) - set(known)
        if unknown:
            parser.error(f"--only must name cases of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        for name, (what, most_seconds, most_mib, measure) in known.items():
            if not arguments.only or name in arguments.only:
                old[name] = Row(name, what, *measure(), most_seconds, most_mib, commit())
                print(page([old[name]]).splitlines()[-1], flush=True)
                limits = {name: {"most_seconds": case[1], "most_mib": case[2]} for name, case in known.items()}
                rows = [replace(old[name], **limits[name]) for name in known if name in old]
                RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
                RESULTS.with_suffix(".md").write_text(page(rows))
    bad = [row.name for row in rows if not row.fits]
    if bad:
        raise SystemExit(f"over the limit: {', '.join(bad)}")


if __name__ == "__main__":
    main()
