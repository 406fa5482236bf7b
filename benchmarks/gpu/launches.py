"""Kernel launches of a compiled distiller: `python -m benchmarks.gpu.launches`, minutes; needs Triton, no GPU.

Inductor generates the code for an H100 (benchmarks/gpu/inductor.py) of the graphs of a training step: LGD or ICD,
forward and backward, bfloat16 autocast, dynamic box counts. The calls in that code are counted: each kernel generated
by Inductor is one launch; library calls of torch and fastkd's ops count by CALLS and launches_of. Not included: the
detector, the gradient sums where the pyramid leaves the graph, inputs prepared on the host, the optimiser.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config

from benchmarks.environment import commit
from benchmarks.gpu import inductor as gpu_inductor
from benchmarks.gpu.roofline import PUBLISHED
from benchmarks.ops.draws import Shape
from fastkd.files import write_json
from fastkd.ops._support import library
from fastkd.training.methods import ICDConfig, LGDConfig
from fastkd.training.methods.protocol import Given
from fastkd.training.parallel.compiled import COMBINED, Regions
from fastkd.training.schedule import Phase
from fastkd.training.step import StepModule
from fastkd.types import Batch, ClassPriors

OUT = Path("docs/results/launches.md")
CLASSES = 80
METHODS = {method.kind: method for method in (LGDConfig, ICDConfig)}

# Launches of a library call. Convolutions and products count as one; libraries may split them or add a copy.
CALLS = {
    "extern_kernels.mm": 1,
    "extern_kernels.addmm": 1,
    "extern_kernels.bmm": 1,
    "extern_kernels.baddbmm": 1,
    "extern_kernels.convolution": 1,
    "aten.convolution_backward": 1,  # per required gradient
    "aten._scaled_dot_product_efficient_attention": 1,
    "aten._scaled_dot_product_efficient_attention_backward": 2,  # one clears the workspace
    "aten.index_add": 2,  # one copies
}
KINDS = ("generated", "products", "convolutions", "fastkd", "other")


def launches_of(op: str, levels: int, last: bool, casts: int = 2) -> int:
    """Launches of an op fastkd::`op`: its own kernels and torch's between them.

    tests/benchmarks/test_launches.py counts the same.

    Args:
        levels: L. last: levels are channels-last. casts: small tensors that the attention casts to the levels' dtype.
    """
    return {
        "instance_norm_mse": 5 if last else 2,  # contiguous: one more where some rows are long and others are not
        "instance_norm_mse_backward": 1,
        "norm_relu_box_pool": 4,
        "norm_relu_box_pool_backward": 2,
        "box_paint_conv3x3": 1,
        "box_paint_conv3x3_backward": 3,
        "value_mimic": 2,
        "value_mimic_backward": 1,
        "instance_attention": 2 + casts,
        "instance_attention_backward": 2 + casts + 1,  # + 1: cast of the output's gradient
        "attention_mass": 1 + casts,
    }[op]


def count(text: str, levels: int, last: bool = True) -> collections.Counter[str]:
    """Launches in a wrapper that Inductor wrote, by kind.

    Raises: ValueError for a call that CALLS does not know.
    """
    found: collections.Counter[str] = collections.Counter()
    body = text[text.index("def call(self, args)") : text.index("runner = Runner")]
    for line in (line.strip() for line in body.splitlines()):
        if line.startswith(("#", "assert_")):
            continue
        if re.match(r"triton_\w+\.run\(", line):
            found["generated"] += 1
        elif call := re.search(r"(extern_kernels|torch\.ops\.\w+)\.(\w+)(\.\w+)?\(", line):
            library, name = call[1].removeprefix("torch.ops."), call[2]
            if library == "fastkd":
                how = {}
                if name.startswith("attention") or name.startswith("instance_attention"):
                    how = {"casts": 1 if "], None, [" in line else 2}  # no key_weight: absorbed in the queries
                found["fastkd"] += launches_of(name, levels, last, **how)
            elif f"{library}.{name}" not in CALLS:
                raise ValueError(f"launches: {library}.{name} must be in CALLS; add how many kernels it launches")
            else:
                many = CALLS[f"{library}.{name}"]
                if name == "convolution_backward":
                    many *= line.rsplit("[", 1)[1].count("True")
                found[_kind(name)] += many
        elif re.search(r"\.(copy_|zero_|fill_)\(", line):
            found["other"] += 1
    return found


def _kind(name: str) -> str:
    if name.startswith("convolution"):
        return "convolutions"
    return "products" if name.endswith("mm") else "other"


def _empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="cuda")


def _pyramid(shape: Shape, last: bool, grad: bool) -> list[Tensor]:
    order = torch.channels_last if last else torch.contiguous_format
    levels = [_empty(shape.images, shape.channels, *size, dtype=torch.bfloat16) for size in shape.level_sizes]
    return [level.contiguous(memory_format=order).requires_grad_(grad) for level in levels]


def _batch(shape: Shape) -> Batch:
    counts = [1 + image % (2 * shape.boxes - 1) for image in range(shape.images)]
    boxes = sum(counts)
    return Batch(
        images=_empty(shape.images, 3, shape.height, shape.width),
        image_sizes=_empty(shape.images, 2, dtype=torch.int64),
        boxes=_empty(boxes, 4),
        labels=_empty(boxes, dtype=torch.int64),
        image_index=_empty(boxes, dtype=torch.int64),
        counts=counts,
        seeds=list(range(shape.images)),
    )


@dataclasses.dataclass(frozen=True)
class _Detector:
    """The attributes of student and teacher that LGD and ICD use."""

    channels: int
    num_classes: int = CLASSES


def _distiller(method: str, shape: Shape, last: bool) -> nn.Module:
    sizes = ((CLASSES,), (CLASSES, 2), (CLASSES, 2))
    detector = _Detector(shape.channels)
    with torch.device("cuda"):
        priors = ClassPriors(*(torch.empty(size, dtype=torch.float64) for size in sizes))
        module = METHODS[method](heads=shape.heads).build(Given(detector, detector, priors))
    for part in module.modules() if last else ():
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight.dim() == 4:
                setattr(part, name, nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last)))
    return module


def _step(method: str, shape: Shape, last: bool, regions: Regions) -> None:
    """Forward and backward of a distiller in a training step, with a given teacher pyramid."""
    module, batch, student = _distiller(method, shape, last), _batch(shape), _pyramid(shape, last, True)
    step = StepModule(nn.Module(), module, object(), None, regions)
    with torch.autocast("cuda", torch.bfloat16):
        made = step.distill_by(module, student, batch, Phase(), lambda: _pyramid(shape, last, False))
    # the head's loss gives a gradient to the instructive pyramid
    results = [torch.stack(list(made.losses.values())).sum(), *(made.instructive or [])]
    torch.autograd.backward(results, [torch.ones_like(one) for one in results])


@contextlib.contextmanager
def _every_kernel() -> Iterator[None]:
    """Context in which fastkd's ops are assumed to have GPU kernels, whether built or not."""
    with mock.patch.object(library, "why_not_on_card", lambda op, index: None):
        yield


def measure(method: str, shape: Shape = PUBLISHED, last: bool = True, combined: bool = False) -> dict:
    """Launches of a method in a step, {"forward": {kind: launches}, "backward": ...}.

    Args:
        method: "lgd" or "icd".
        shape: of the batch. last: pyramids and weights are channels-last, as recipes have them.
        combined: with Inductor's COMBINED settings.
    """
    wrappers = gpu_inductor.Wrappers()
    torch._dynamo.reset()
    try:
        with (
            gpu_inductor.fake_card(),
            _every_kernel(),
            config.patch(COMBINED if combined else {}),
        ):
            _step(method, shape, last, Regions(True, wrappers))
    finally:
        torch._dynamo.reset()
    if [backward for backward, _ in wrappers.found] != [False, True]:
        raise RuntimeError(f"launches: {method} must be one graph forward and one backward, got {len(wrappers.found)}")
    sides = zip(("forward", "backward"), wrappers.found, strict=True)
    return {side: dict(count(text, len(shape.strides), last)) for side, (_, text) in sides}


def table(results: dict[str, dict]) -> list[str]:
    """One row per method, setting and direction, and a row for their sum."""
    lines = [
        f"| method | Inductor's settings | | {' | '.join(KINDS)} | launches |",
        "|" + "---|" * (len(KINDS) + 4),
    ]
    for name, sides in results.items():
        method, setting = name.split(" ", 1)
        total: collections.Counter[str] = collections.Counter()
        for kinds in sides.values():
            total.update(kinds)
        for side, kinds in (*sides.items(), ("both", total)):
            numbers = " | ".join(str(kinds.get(kind, 0)) for kind in KINDS)
            lines.append(f"| {method} | {setting} | {side} | {numbers} | {sum(kinds.values())} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, action="append", help="default: both")
    parser.add_argument("--settings", choices=["default", "combined"], action="append", help="default: both")
    sides = ("images", "height", "width", "channels", "boxes")
    for name in sides:
        parser.add_argument(f"--{name}", type=int, default=getattr(PUBLISHED, name))
    parser.add_argument("--strides", type=int, nargs="+", default=PUBLISHED.strides, help="of the levels")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--write", action="store_true", help=f"write {OUT}")
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in sides}
    shape = dataclasses.replace(PUBLISHED, **given, strides=tuple(chosen.strides))
    results = {}
    for method in chosen.method or METHODS:
        for setting in chosen.settings or ("default", "combined"):
            results[f"{method} {setting}"] = measure(method, shape, combined=setting == "combined")
            print(table({f"{method} {setting}": results[f"{method} {setting}"]})[-1], flush=True)
    lines = table(results)
    print("\n".join(lines))
    if chosen.json:
        write_json(chosen.json, results)
    if chosen.write:
        OUT.write_text(page(lines, shape), encoding="utf-8")


def page(lines: list[str], shape: Shape) -> str:
    """docs/results/launches.md."""
    combined = ", ".join(f"{name}={value}" for name, value in COMBINED.items())
    parts = [
        "# Kernels that a compiled distiller launches, counted on the generated code",
        f"Written by `python -m benchmarks.gpu.launches --write` at commit {commit()}, torch {torch.__version__}. "
        "There was no GPU: Inductor wrote its code for an H100, nothing of it ran.\n"
        f"B = {shape.images}, {shape.height} x {shape.width}, C = {shape.channels}, {len(shape.strides)} levels, "
        "channels-last, bfloat16 autocast; the detector and its head are not in it.",
        "\n".join(lines),
        "`generated`: kernels Inductor writes; `products`, `convolutions`: calls of cuBLAS and cuDNN, each counted\n"
        "once (backward of a convolution: once a gradient); `fastkd`: the kernels of this library's ops, with torch's\n"
        f"small ones inside of them. `combined`, which --runtime.compile sets on a GPU: {combined}.\n"
        "`default`: the same without.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
