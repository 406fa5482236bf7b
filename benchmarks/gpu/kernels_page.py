"""Writes docs/results/gpu-kernels.md: `python -m benchmarks.gpu.kernels_page` (minutes; needs `make cuda`, no GPU).

Registers, shared memory, spills, access width and matrix instructions of every GPU kernel, read from the binaries for
each card, and the traffic model with PREDICTED times.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import triton

from benchmarks.environment import commit
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import traffic as gpu_traffic
from benchmarks.gpu import triton_report
from benchmarks.gpu.report import Kernel
from benchmarks.gpu.roofline import CARDS, H100, PUBLISHED
from fastkd.ops._support import library

OUT = Path("docs/results/gpu-kernels.md")


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def cuda_rows(kernels: list[Kernel]) -> list[str]:
    """One row per kernel and card; ranges over the instantiations (dtypes, index types, memory formats)."""
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        name = re.match(r"\w+", kernel.name).group()
        groups.setdefault((kernel.source, name, kernel.card), []).append(kernel)
    lines = [
        "| source | kernel | card | instantiations | registers | static shared, bytes | stack, bytes | spills | "
        "16-byte accesses | matrix instructions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (source, name, card), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])):
        numbers = [
            _span([getattr(member, field) for member in members])
            for field in ("registers", "shared", "stack", "spills", "wide", "tensor_cores")
        ]
        lines.append(f"| {source} | {name} | {card} | {len(members)} | {' | '.join(numbers)} |")
    return lines


def traffic_rows() -> list[str]:
    """One row per launch, bfloat16."""
    heads = " | ".join(f"{card.name} PREDICTED, ms" for card in CARDS)
    lines = [
        f"| op | memory order | launch | read MB | written MB | from L2 MB | GFLOP | {heads} |",
        "|" + "---|" * (7 + len(CARDS)),
    ]
    for name, model in gpu_traffic.MODELS.items():
        for last in (False, True):
            for launch in model(PUBLISHED, 2, last):
                numbers = [launch.read, launch.written, launch.cache]
                moved = " | ".join(f"{number / 1e6:.1f}" for number in numbers)
                times = " | ".join(f"{1e3 * launch.seconds(card):.3f}" for card in CARDS)
                order = "channels-last" if last else "contiguous"
                work = (launch.matrix + launch.scalar) / 1e9
                lines.append(f"| {name} | {order} | {launch.name} | {moved} | {work:.1f} | {times} |")
    return lines


def page(kernels: list[Kernel], rows: list[triton_report.Row]) -> str:
    """The Markdown."""
    shape = PUBLISHED
    spilled = sum(row.spilled > 0 for row in rows) + sum(bool(kernel.stack or kernel.spills) for kernel in kernels)
    parts = [
        "# The GPU kernels: resources, traffic and PREDICTED times",
        f"Written by `python -m benchmarks.gpu.kernels_page` at commit {commit()}. Nothing here ran on a GPU: "
        "resources are read back from machine code (cuobjdump), times are PREDICTED from data sheets and the model of "
        "the kernels' traffic.\n"
        f"CUDA: {library.cuda_build()}. Triton {triton.__version__}. Kernels with a spill or a stack: {spilled}.",
        "## Aims",
        f"B = {shape.images}, {shape.height} x {shape.width}, C = {shape.channels}, G = {shape.heads}, "
        f"{shape.boxes} boxes an image, bfloat16, forward and backward.",
        "\n".join(gpu_traffic.aims(shape, H100)),
        "## CUDA C++",
        "\n".join(cuda_rows(kernels)),
        "## Triton",
        "\n".join(triton_report.table(rows)),
        "## Traffic model and PREDICTED times, launch by launch",
        "Attention with 42 queries. Bytes count once a launch; tests/benchmarks/test_gpu_traffic.py holds five ops "
        "against the emulation, the others are counted by hand.",
        "\n".join(traffic_rows()),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--library", type=Path, default=library.BUILT_IN_CUDA)
    chosen = parser.parse_args(arguments)
    if not chosen.library.is_file():
        raise SystemExit(f"gpu: {chosen.library} does not exist; `make cuda` builds it or says what is missing")
    text = page(gpu_report.read_kernels(chosen.library), triton_report.read_kernels())
    chosen.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
