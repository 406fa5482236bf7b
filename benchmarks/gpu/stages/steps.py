"""Methods on given pyramids, and whole training steps of RetinaNet-R50: fastkd and plain torch in the same dtype."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.roofline import PUBLISHED
from benchmarks.gpu.stages import Context
from benchmarks.gpu.stages.timing import measure
from benchmarks.step.candidates import NUM_CLASSES, Candidate, Problem, build, is_low, priors
from fastkd.distillers import ICD, LGD
from fastkd.ops import use_backend
from fastkd.training.parallel.compiled import Regions
from fastkd.training.schedule import Phase
from fastkd.training.step import StepModule

FORMS = ("ours", "plain", "ours compiled")


def problem_of(context: Context, images: int) -> Problem:
    """RetinaNet on padded images of the papers' recipes; small images for a rehearsal."""
    if context.toy:
        return Problem("retinanet", 1, 2, 64, 64)
    return Problem("retinanet", images, 7, PUBLISHED.height, PUBLISHED.width)


def _pyramid(problem: Problem, device: str, grad: bool) -> list[Tensor]:
    sizes = [(-(-problem.height // stride), -(-problem.width // stride)) for stride in (8, 16, 32, 64, 128)]
    levels = [torch.randn(problem.images, 256, *size, device=device, dtype=torch.bfloat16) for size in sizes]
    return [level.contiguous(memory_format=torch.channels_last).requires_grad_(grad) for level in levels]


DISTILLERS: dict[str, Callable[[], nn.Module]] = {
    "lgd": lambda: LGD(NUM_CLASSES, 256),
    "icd": lambda: ICD(NUM_CLASSES, priors(), 256),
}


def _part(method: str, form: str, problem: Problem, device: str) -> Callable[[], None]:
    """Forward and backward of a method between given pyramids, under bfloat16 autocast, channels-last."""
    torch.manual_seed(0)
    distiller = DISTILLERS[method]().to(device, memory_format=torch.channels_last)
    batch = problem.batch().to(device)
    student, teacher = _pyramid(problem, device, True), _pyramid(problem, device, False)
    step = StepModule(nn.Module(), distiller, object(), None, Regions(form == "ours compiled"))

    def work() -> None:
        with torch.autocast(device, torch.bfloat16), use_backend("reference" if form == "plain" else "compiled"):
            made = step.distill_by(distiller, student, batch, Phase(), lambda: teacher)
        results = [sum(value.float() for value in made.losses.values()), *(made.instructive or [])]
        torch.autograd.backward(results, [torch.ones_like(one) for one in results])
        for tensor in (*student, *distiller.parameters()):
            tensor.grad = None

    return work


def parts(context: Context) -> None:
    """The stage: LGD and ICD without a detector, eager first."""
    problem = problem_of(context, PUBLISHED.images)
    context.record("problem", dataclasses.asdict(problem))
    for form in FORMS[:2] if context.toy else FORMS:  # compilation is too slow for a rehearsal
        for method in ("lgd", "icd"):
            if context.left < 5:
                context.record(f"{method} {form}", {"error": "no time"})
                continue
            context.attempt(f"{method} {form}", lambda m=method, f=form: _timed(_part, m, f, problem, context))
            torch.cuda.empty_cache()


def _timed(make: Callable[..., Callable[[], None]], method: str, form: str, problem: Problem, context: Context):
    work = make(method, form, problem, context.device)
    return measure(work, torch.device(context.device), 0.0 if context.toy else 1.0, captured=False)


def placed(method: str, form: str, dtype: str, problem: Problem, device: str) -> Candidate:
    """A candidate on a device.

    Args:
        form: "ours", "plain" or "ours compiled".
        dtype: "bfloat16" or "float32".
    """
    plain = "plain-bfloat16" if dtype == "bfloat16" else "plain"
    kind = {"ours": dtype, "plain": plain, "ours compiled": "compile"}[form]
    candidate = build(problem, method, kind)
    layout = torch.channels_last if is_low(kind) else torch.contiguous_format
    candidate.module.to(device=device, memory_format=layout)
    if candidate.frozen is not None:
        candidate.frozen.to(device=device, memory_format=layout)
    for optimizer in candidate.optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(parameter) if value.shape == parameter.shape else value.to(device)
    candidate.batch = candidate.batch.to(device, memory_format=layout)
    return candidate


def _step(method: str, form: str, dtype: str, problem: Problem, context: Context) -> dict[str, Any]:
    candidate = placed(method, form, dtype, problem, context.device)
    found = measure(candidate.step, torch.device(context.device), 0.0 if context.toy else 1.5, captured=False)
    return {**found, "images_per_s": 1e3 * problem.images / found["wall_ms"]}


def steps(context: Context) -> None:
    """The stage: whole steps, bfloat16 before float32, compiled last."""
    torch.backends.cudnn.benchmark = True
    calls = [
        (method, form, dtype, images)
        for dtype, images, forms in (
            ("bfloat16", 16, ("ours", "plain")),
            ("float32", 4, ("ours", "plain")),
            ("bfloat16", 16, ("ours compiled",)),
        )
        for method in ("student", "lgd", "icd")
        for form in forms
    ]
    if context.toy:
        calls = [("student", "plain", "bfloat16", 1), ("lgd", "ours", "bfloat16", 1)]
    for method, form, dtype, images in calls:
        name = f"{method} {form} {dtype} B={images}"
        if context.left < 8:
            context.record(name, {"error": "no time"})
            continue
        problem = problem_of(context, images)
        context.attempt(name, lambda m=method, f=form, d=dtype, p=problem: _step(m, f, d, p, context))
        with contextlib.suppress(RuntimeError):  # after a device error, freeing memory raises
            torch.cuda.empty_cache()
