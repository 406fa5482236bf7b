"""Bytes that a training step sends and the efficiency PROJECTED from them: python -m benchmarks.scaling [--write].

The bytes are counted: 4 (or 2, compressed) for every parameter that trains, of the COCO recipes' detectors and methods;
tests/training/test_four_processes.py counts the same number sent. Times and efficiencies are a model's: nothing was
run on these machines. --write puts the tables between the marks of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkd.detectors import build_detector
from fastkd.training import Recipe, get_recipe, recipe_names
from fastkd.training.build import build_distiller
from fastkd.training.methods.protocol import Given
from fastkd.types import ClassPriors

DETECTORS = ("retinanet", "fcos", "atss", "poto", "faster-rcnn", "mask-rcnn", "condinst", "solov2")
METHODS = ("lgd", "icd", "fgfi")
PAGE = Path(__file__).parent.parent / "docs/scaling.md"
BEGIN, END = "<!-- python -m benchmarks.scaling --write: begin -->", "<!-- end -->"
GPUS = (8, 16, 32, 64, 128, 256)
SECONDS = (0.15, 0.05)  # assumed of a step on one GPU
BUCKET = 25 * 2**20  # bytes; DDP's


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in nodes of eight, from data sheets, and what is assumed of them.

    Args:
        name: in the table.
        inside: bytes a second and direction of a GPU to the others of its node.
        between: bytes a second and direction of a node to the others, all its network cards.
        latency: seconds of a message between nodes (assumed).
        per_node: GPUs of a node.
        used: part of a link's bytes that a ring gets (assumed).
    """

    name: str
    inside: float
    between: float
    latency: float
    per_node: int = 8
    used: float = 0.7


INFINIBAND = Machine("InfiniBand", 450e9, 8 * 50e9, 5e-6)
ETHERNET = Machine("Ethernet", 450e9, 12.5e9, 30e-6)


@dataclass(frozen=True)
class Step:
    """What is assumed of a step on one GPU.

    Args:
        seconds: of computing, without any exchange.
        backward: part of it that is the backward pass.
        overlap: part of the backward pass in which gradients travel unseen.
        agreements: small reductions that everybody waits for: the losses' divisors, stop and NaN.
        message: seconds of one of their 2 log2(n) messages, by TCP.
    """

    seconds: float
    backward: float = 2 / 3
    overlap: float = 0.8
    agreements: int = 6
    message: float = 30e-6


@functools.cache
def trainable(recipe: Recipe) -> tuple[int, int]:
    """Numbers that train: of the student, and of the method."""
    with torch.device("meta"):
        student = build_detector(recipe.detector)
        teacher = build_detector(dataclasses.replace(recipe.detector, backbone="resnet101"))
    classes = recipe.detector.num_classes
    size = torch.full((classes, 2), 0.1, dtype=torch.float64)
    priors = ClassPriors(torch.full((classes,), 1 / classes, dtype=torch.float64), size, size / 10)
    with torch.device("meta"):
        method = build_distiller(recipe, Given(student, teacher, priors))
    counts = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (student, method) if part]
    return counts[0], sum(counts[1:])


def ring_bytes(size: int, gpus: int) -> float:
    """Bytes each GPU sends (and receives) in a ring all-reduce of `size` bytes."""
    return 2 * (gpus - 1) / gpus * size


def exchange_seconds(size: int, gpus: int, machine: Machine) -> float:
    """PREDICTED time of an all-reduce of gradients: the slowest link's bytes, and 2 (n - 1) messages a bucket."""
    several = gpus > machine.per_node
    bandwidth = min(machine.inside, machine.between) if several else machine.inside
    latency = machine.latency if several else 2e-6
    # rings over all cards of a node: together they carry the whole across its border
    hops = 2 * (math.ceil(gpus / machine.per_node) - 1) if several else 2 * (gpus - 1)
    return ring_bytes(size, gpus) / (machine.used * bandwidth) + math.ceil(size / BUCKET) * hops * latency


def efficiency(size: int, gpus: int, machine: Machine, step: Step) -> float:
    """PREDICTED part of a step that computes: 1 means n GPUs train n times the images of one."""
    exchange = exchange_seconds(size, gpus, machine)
    last = exchange_seconds(min(size, BUCKET), gpus, machine)  # leaves when nothing is left to hide it
    hidden = min(exchange - last, step.overlap * step.backward * step.seconds)
    small = step.agreements * 2 * math.ceil(math.log2(gpus)) * step.message
    return step.seconds / (step.seconds + exchange - hidden + small)


def volume_table() -> str:
    """What each detector and method has to send."""
    lines = ["| R50 detector | trains | MB a step | with LGD | with ICD | with FGFI | sent by each of 8 / 256, LGD |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for name in DETECTORS:
        student, _ = trainable(get_recipe(f"coco-{name}-baseline"))
        row = [f"| {name} | {student / 1e6:.1f} M | {4 * student / 1e6:.0f}"]
        sizes = {}
        for method in METHODS:
            if f"coco-{name}-{method}" not in recipe_names():  # the method cannot train this detector
                row.append("-")
                continue
            own = trainable(get_recipe(f"coco-{name}-{method}"))[1]
            sizes[method] = 4 * (student + own)
            row.append(f"{sizes[method] / 1e6:.0f} (+ {4 * own / 1e6:.1f})")
        sent = [f"{ring_bytes(sizes['lgd'], gpus) / 1e6:.0f}" for gpus in (8, 256)]
        lines.append(" | ".join([*row, " / ".join(sent)]) + " |")
    return "\n".join(lines)


def efficiency_table(seconds: tuple[float, ...]) -> str:
    """Predicted efficiency of RetinaNet-R50 with LGD, for steps of so many seconds on one GPU."""
    lines = [f"| PROJECTED efficiency, RetinaNet-R50 with LGD | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |"]
    lines += ["|---|" + "--:|" * len(GPUS)]
    numbers = sum(trainable(get_recipe("coco-retinanet-lgd")))
    for machine, taken, kind in itertools.product((INFINIBAND, ETHERNET), seconds, ("float32", "bf16")):
        size = numbers * (2 if kind == "bf16" else 4)
        found = [f"{efficiency(size, gpus, machine, Step(taken)):.1%}" for gpus in GPUS]
        lines.append(f"| {machine.name}, {taken:g} s a step, {kind} | {' | '.join(found)} |")
    return "\n".join(lines)


def tables(seconds: tuple[float, ...] = SECONDS) -> str:
    """Everything between the marks of the page."""
    return f"{BEGIN}\n{volume_table()}\n\n{efficiency_table(seconds)}\n{END}"


def write(page: Path) -> None:
    """Puts the tables between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + tables() + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    """Prints the tables, and writes them into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-seconds", type=float, nargs="+", help="of computing on one GPU, to be assumed")
    parser.add_argument("--write", action="store_true", help=f"put the tables of the page's own steps into {PAGE.name}")
    options = parser.parse_args()
    print(tables(tuple(options.step_seconds or SECONDS)))
    if options.write:
        write(PAGE)


if __name__ == "__main__":
    main()
