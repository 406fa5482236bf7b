"""Bytes sent by a training step and the efficiency PROJECTED from them: python -m benchmarks.scaling [--write].

The bytes are counted: 4 (or 2, compressed) for each trainable parameter of the COCO recipes' detectors and methods;
tests/training/test_four_processes.py measures the same number. Times and efficiencies are modelled: nothing was run on
these machines. --write inserts the tables between the marks of docs/scaling.md.
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
SECONDS = (0.15, 0.05)  # assumed duration of a step on one GPU
BUCKET = 25 * 2**20  # bytes; DDP's


@dataclass(frozen=True)
class Machine:
    """A cluster of nodes of eight GPUs, from data sheets and assumptions.

    Args:
        name: name in the table.
        inside: bytes per second and direction between a GPU and the others of its node.
        between: bytes per second and direction between a node and the others, over all its network cards.
        latency: seconds per message between nodes (assumed).
        per_node: GPUs per node.
        used: fraction of a link's bandwidth that a ring achieves (assumed).
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
    """Assumptions about a step on one GPU.

    Args:
        seconds: of computation, without communication.
        backward: fraction of it in the backward pass.
        overlap: fraction of the backward pass in which communication is hidden.
        agreements: small blocking reductions: the losses' divisors, stop and NaN.
        message: seconds of one of their 2 log2(n) messages, by TCP.
    """

    seconds: float
    backward: float = 2 / 3
    overlap: float = 0.8
    agreements: int = 6
    message: float = 30e-6


@functools.cache
def trainable(recipe: Recipe) -> tuple[int, int]:
    """Trainable parameters of the student, and of the method."""
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
    """PREDICTED time of an all-reduce of gradients: bytes of the slowest link, and 2 (n - 1) messages per bucket."""
    several = gpus > machine.per_node
    bandwidth = min(machine.inside, machine.between) if several else machine.inside
    latency = machine.latency if several else 2e-6
    # rings over all network cards of a node together carry all bytes between nodes
    hops = 2 * (math.ceil(gpus / machine.per_node) - 1) if several else 2 * (gpus - 1)
    return ring_bytes(size, gpus) / (machine.used * bandwidth) + math.ceil(size / BUCKET) * hops * latency


def efficiency(size: int, gpus: int, machine: Machine, step: Step) -> float:
    """PREDICTED fraction of a step spent computing: with 1, n GPUs process n times the images of one."""
    exchange = exchange_seconds(size, gpus, machine)
    last = exchange_seconds(min(size, BUCKET), gpus, machine)  # sent after the backward pass, so not hidden
    hidden = min(exchange - last, step.overlap * step.backward * step.seconds)
    small = step.agreements * 2 * math.ceil(math.log2(gpus)) * step.message
    return step.seconds / (step.seconds + exchange - hidden + small)


def volume_table() -> str:
    """Bytes sent by each detector and method."""
    lines = ["| R50 detector | trains | MB a step | with LGD | with ICD | with FGFI | sent by each of 8 / 256, LGD |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for name in DETECTORS:
        student, _ = trainable(get_recipe(f"coco-{name}-baseline"))
        row = [f"| {name} | {student / 1e6:.1f} M | {4 * student / 1e6:.0f}"]
        sizes = {}
        for method in METHODS:
            if f"coco-{name}-{method}" not in recipe_names():  # not supported by the method
                row.append("-")
                continue
            own = trainable(get_recipe(f"coco-{name}-{method}"))[1]
            sizes[method] = 4 * (student + own)
            row.append(f"{sizes[method] / 1e6:.0f} (+ {4 * own / 1e6:.1f})")
        sent = [f"{ring_bytes(sizes['lgd'], gpus) / 1e6:.0f}" for gpus in (8, 256)]
        lines.append(" | ".join([*row, " / ".join(sent)]) + " |")
    return "\n".join(lines)


def efficiency_table(seconds: tuple[float, ...]) -> str:
    """Predicted efficiency of RetinaNet-R50 with LGD, for step times in seconds on one GPU."""
    lines = [f"| PROJECTED efficiency, RetinaNet-R50 with LGD | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |"]
    lines += ["|---|" + "--:|" * len(GPUS)]
    numbers = sum(trainable(get_recipe("coco-retinanet-lgd")))
    for machine, taken, kind in itertools.product((INFINIBAND, ETHERNET), seconds, ("float32", "bf16")):
        size = numbers * (2 if kind == "bf16" else 4)
        found = [f"{efficiency(size, gpus, machine, Step(taken)):.1%}" for gpus in GPUS]
        lines.append(f"| {machine.name}, {taken:g} s a step, {kind} | {' | '.join(found)} |")
    return "\n".join(lines)


def tables(seconds: tuple[float, ...] = SECONDS) -> str:
    """The text between the marks of the page."""
    return f"{BEGIN}\n{volume_table()}\n\n{efficiency_table(seconds)}\n{END}"


def write(page: Path) -> None:
    """Insert the tables between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + tables() + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    """Print the tables; with --write also insert them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-seconds", type=float, nargs="+", help="of computing on one GPU, to be assumed")
    parser.add_argument("--write", action="store_true", help=f"put the tables of the page's own steps into {PAGE.name}")
    options = parser.parse_args()
    print(tables(tuple(options.step_seconds or SECONDS)))
    if options.write:
        write(PAGE)


if __name__ == "__main__":
    main()
