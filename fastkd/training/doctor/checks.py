"""Checks a recipe before training: `examine(recipe)` looks for the usual reasons why distillation gains nothing.

These are: a wrong class map, an untrained teacher, a distillation loss that is zero, too weak, too strong or dominated
by one level, an option that is off, too little memory, a slow loader.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastkd import assets
from fastkd.data import DetectionDataset
from fastkd.detectors import Detector, check_teacher, inherit, load_detector
from fastkd.progress import track
from fastkd.training.build import Built, build, open_data
from fastkd.training.config import Recipe
from fastkd.training.cost import ledger as cost
from fastkd.training.doctor.finding import Finding, Status
from fastkd.training.doctor.stability import check_stability
from fastkd.training.doctor.teacher import check_quality
from fastkd.training.doctor.teaching import check_boxes, check_teaching
from fastkd.training.parallel.processes import Processes, processes
from fastkd.training.run.loading import train_loader
from fastkd.training.schedule import Phase, phase_at
from fastkd.training.step import StepModule, sum_losses
from fastkd.types import Batch

WEAK, STRONG = 0.01, 0.95  # limits of the method's share of the gradient at the pyramid
ONE_LEVEL, OWN_LEVEL = 0.9, 0.6  # one level's share of the sum of gradient norms: of the method, of the detector
FEW_INHERITED, MOST_INHERITED = 0.5, 0.8  # shares of inherited tensors; laterals differ if the backbones do
FIT_STEPS, FIT_RATE = 12, 1e-3


def examine(
    recipe: Recipe,
    *,
    batches: int = 4,
    device: torch.device | str | None = None,
    run_dir: Path | None = None,
) -> Iterator[Finding]:
    """Checks a recipe, its files and its first batches; yields each finding at once. Nothing is trained.

    Args:
        recipe: the recipe to be trained.
        batches: number of batches to evaluate the teacher and the losses on, >= 1.
        device: device of the run; None takes a GPU if there is one.
        run_dir: directory of an earlier run, to check its log for jumps of the loss and for what the method taught;
            None skips both checks.
    Raises: ValueError if batches is less than 1.
    """
    if batches < 1:
        raise ValueError(f"examine: batches must be at least 1, got {batches}")
    yield from check_switches(recipe)
    yield from check_stability(recipe, run_dir)
    if run_dir is not None:
        yield from check_teaching(recipe, run_dir)
    data = None
    try:
        data = open_data(recipe)
    except (ValueError, OSError) as error:
        yield Finding("problem", "data", str(error))
    else:
        yield from check_classes(recipe, data[0])
    try:
        built = build(recipe, data)
    except (ValueError, OSError) as error:
        yield Finding("problem", "set-up", f"the run cannot begin: {error}")
        return
    yield from check_boxes(built)
    with processes(device) as group:
        module = built.module.to(group.device)
        teacher = None if recipe.teacher is None else load_detector(assets.resolve(recipe.teacher))[0].to(group.device)
        if teacher is not None:
            yield from check_quality(teacher, built, batches, group.device)
        yield from check_start(built, teacher)
        parts, loader = _first_batches(built, batches, group)
        if module.distiller is not None:
            if module.teacher is not None:
                module.teacher.to(group.device, torch.contiguous_format)
                yield from check_pyramids(built, parts[0].to(group.device))
            yield from check_gradients(built, [part.to(group.device) for part in parts])
        yield from check_cost(built, parts, loader, group)


def check_switches(recipe: Recipe) -> Iterator[Finding]:
    """Settings that contradict the published ones or switch the method off."""
    found = list(recipe.method.advice(recipe)) if recipe.method is not None else []
    if recipe.backbone_weights is None:
        text = "the backbone starts at random; pass --backbone-weights if that is not meant"
        found.append(Finding("warning", "switches", text))
    if recipe.detector.frozen_stages == 5:
        found.append(Finding("warning", "switches", "frozen_stages 5 freezes the whole backbone"))
    yield from found
    if not found:
        yield Finding("ok", "switches", "as published, nothing is off")


def check_classes(recipe: Recipe, train_set: DetectionDataset) -> Iterator[Finding]:
    """Whether data, student and teacher have the same classes."""
    names, have = train_set.class_names, recipe.detector.num_classes
    boxes = len(train_set.objects()[0])
    yield Finding("ok" if boxes else "problem", "data", f"{len(train_set)} images with {boxes} boxes")
    if have != len(names):
        status: Status = "warning" if recipe.data.match_classes else "problem"
        yield Finding(status, "classes", f"the recipe says {have} classes, the data have {len(names)}")
    if recipe.teacher is None:
        yield Finding("ok", "classes", f"{len(names)}: {_shortened(names)}")
        return
    try:
        teacher, theirs = load_detector(assets.resolve(recipe.teacher))
    except (ValueError, OSError) as error:
        yield Finding("problem", "teacher", str(error))
        return
    if list(theirs) == list(names):
        yield Finding("ok", "classes", f"teacher, student and data agree on {len(names)}: {_shortened(names)}")
    else:
        yield Finding("problem", "classes", _difference(list(theirs), list(names)))
    student = dataclasses.replace(recipe.detector, num_classes=teacher.num_classes)
    if tuple(teacher.strides) != tuple(student.strides):
        yield Finding(
            "problem", "teacher", f"its pyramid has strides {list(teacher.strides)}, ours {list(student.strides)}"
        )


def _difference(theirs: list[str], ours: list[str]) -> str:
    if sorted(theirs) == sorted(ours):
        label = next(i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
        what = f"in another order: label {label} is {theirs[label]!r} to it and {ours[label]!r} in the data"
    else:
        what = f"{len(theirs)} ({_shortened(theirs)}) against {len(ours)} of the data ({_shortened(ours)})"
    return f"the teacher's classes are not the data's: {what}; train or convert a teacher for these classes"


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_start(built: Built, teacher: Detector | None) -> Iterator[Finding]:
    """The student's initial weights: backbone weights and tensors inherited from the teacher."""
    if "backbone_weights" in built.notes:
        yield Finding("ok", "backbone", built.notes["backbone_weights"].splitlines()[0])
    if not built.recipe.inherit or teacher is None:
        return
    report = inherit(built.module.detector, teacher)
    total = len(report.matched) + len(report.missing) + len(report.mismatched)
    share = len(report.matched) / total
    status: Status = "problem" if share < FEW_INHERITED else "warning" if share < MOST_INHERITED else "ok"
    text = "; ".join(line.strip() for line in str(report).splitlines())
    yield Finding(status, "inheriting", f"neck and head take from the teacher {text}")


def check_pyramids(built: Built, batch: Batch) -> Iterator[Finding]:
    """Whether the pyramids of student and teacher match, and the method's advice on their values."""
    module, recipe = built.module, built.recipe
    assert module.teacher is not None
    try:
        check_teacher(module.detector, module.teacher.detector)
    except ValueError as error:
        yield Finding("problem", "adapter", str(error))
        return
    with torch.no_grad():
        student, teacher = module.detector.features(batch.images), module.teacher.pyramid(batch.images)
    shapes = [f"{list(a.shape[1:])} to {list(b.shape[1:])}" for a, b in zip(student, teacher)]
    yield Finding("ok", "adapter", "; ".join(shapes))
    if recipe.method is not None:
        yield from recipe.method.pyramid_advice(student, teacher)


def _gradients(built: Built, pyramid: list[Tensor], batch: Batch) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The method's losses, and the gradient norm at each pyramid level: of the detector, of the method."""
    module, dtype = built.module, built.module.dtype

    def norms(losses: dict[str, Tensor]) -> list[float]:
        found = torch.autograd.grad(sum_losses(losses), pyramid, allow_unused=True, retain_graph=True)
        return [0.0 if one is None else float(one.float().norm()) for one in found]

    with torch.autocast(batch.images.device.type, dtype or torch.bfloat16, dtype is not None):
        taught, detected = module.distill(pyramid, batch, Phase()), module.detector.loss(pyramid, batch)
    return taught, norms(detected), norms(taught)


def _fit_method(module: StepModule, examples: list[tuple[list[Tensor], Batch]], precision: torch.autocast) -> None:
    """Trains the method's parameters, if it has any, for a few steps on fixed pyramids of the student."""
    assert module.distiller is not None
    parameters = [p for p in module.distiller.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, FIT_RATE)
    steps = itertools.islice(itertools.cycle(examples), FIT_STEPS)
    for pyramid, batch in track(steps, "train the method on fixed features", "steps", FIT_STEPS):
        optimizer.zero_grad()
        with precision:
            loss = sum_losses(module.distill(pyramid, batch, Phase()))
        loss.backward()
        optimizer.step()
    module.zero_grad(set_to_none=True)


def check_gradients(built: Built, batches: list[Batch]) -> Iterator[Finding]:
    """Whether the distillation loss is nonzero, its share of the gradient at the pyramid, and its share by level.

    The method is first trained for a few steps with a fixed student, because randomly initialised adapters give
    gradients unlike those of training. A run starts from fresh modules.
    """
    module = built.module.eval()
    precise = torch.autocast(batches[0].images.device.type, module.dtype or torch.bfloat16, module.dtype is not None)
    with torch.no_grad(), precise:
        kept = [module.detector.features(batch.images) for batch in batches]
    _fit_method(module, list(zip(kept, batches)), precise)
    losses: dict[str, float] = {}
    own, taught = [0.0] * len(kept[0]), [0.0] * len(kept[0])
    for pyramid, batch in track(list(zip(kept, batches)), "measure the gradients", "batches"):
        leaves = [level.detach().requires_grad_() for level in pyramid]
        values, detector, method = _gradients(built, leaves, batch)
        for name, value in values.items():
            losses[name] = losses.get(name, 0.0) + float(value.detach()) / len(batches)
        own = [a + b / len(batches) for a, b in zip(own, detector)]
        taught = [a + b / len(batches) for a, b in zip(taught, method)]
    yield from judge_losses(losses)
    yield from judge_gradients(own, taught, [f"P{stride.bit_length() - 1}" for stride in module.detector.strides])


def judge_losses(losses: dict[str, float]) -> Iterator[Finding]:
    """Findings on the mean losses of a method, by name."""
    teaching = {name: value for name, value in losses.items() if name.endswith(("_distill", "_imitation"))}
    for name, value in teaching.items():
        if value == 0:
            yield Finding("problem", "loss", f"{name} is 0 on all batches: weight 0, or no object where it counts")
        else:
            yield Finding("ok", "loss", f"{name} {value:.3g}")


def judge_gradients(own: list[float], taught: list[float], levels: list[str]) -> Iterator[Finding]:
    """Findings on the gradient norms of detector and method at each level."""
    total, mine = sum(taught), sum(own)
    shares = [value / (value + other) if value + other else 0.0 for value, other in zip(taught, own)]
    table = ", ".join(f"{name} {share:.0%}" for name, share in zip(levels, shares))
    share = total / (total + mine) if total + mine else 0.0
    if total == 0:
        yield Finding("problem", "gradient", "none of the method reaches the student's pyramid; it is detached or 0")
        return
    text = f"the method makes {share:.1%} of the gradient in the pyramid ({table})"
    if share < WEAK:
        yield Finding("problem", "gradient", f"{text}: too weak to teach anything; raise its weight")
    elif share > STRONG:
        yield Finding("problem", "gradient", f"{text}: it drowns the detector's own; lower its weight")
    else:
        yield Finding("ok", "gradient", text)
    by_level = ", ".join(f"{name} {value / total:.0%}" for name, value in zip(levels, taught))
    most = max(range(len(taught)), key=taught.__getitem__)
    if len(taught) == 1 or taught[most] / total <= ONE_LEVEL:
        yield Finding("ok", "levels", f"the method's gradient by level: {by_level}")
    elif own[most] < OWN_LEVEL * mine:
        advice = "the others are hardly taught; look at the teacher's features there, or normalise them"
        yield Finding("problem", "levels", f"{levels[most]} alone swamps the method's gradient ({by_level}): {advice}")
    else:
        text = f"{levels[most]} makes most of the method's gradient ({by_level}), as of the detector's own"
        yield Finding("warning", "levels", f"{text}: do all objects lie there?")


def _first_batches(built: Built, count: int, group: Processes) -> tuple[list[Batch], float]:
    """The first micro-batches of the run, and the loading time of one in seconds, without the start of the workers."""
    extra = 2
    loader = train_loader(built, group, parts=count + extra)
    found, begin = [], 0.0
    for number, batch in enumerate(track(loader, "load batches", "batches")):
        if number == 0:
            begin = time.perf_counter()
        found.append(batch)
    return found[:count], (time.perf_counter() - begin) / (count + extra - 1)


def check_cost(built: Built, parts: list[Batch], loading: float, group: Processes) -> Iterator[Finding]:
    """Peak memory of a step, the loader's rate compared with the training rate, and the duration of the run."""
    recipe, module = built.recipe, built.module
    quick = dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, ledger_pairs=2))
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    measured = cost.measure(quick, module, trainable, [[part] for part in parts[:2]], group)
    accumulate, steps, peak = recipe.schedule.accumulate, recipe.schedule.steps, measured["with_method"]["peak_bytes"]
    memory = _memory(group.device)
    fits = memory is None or peak < 0.9 * memory
    limit = "" if memory is None else f" of {memory / 2**30:.1f} GiB"
    advice = "" if fits else "; raise --schedule.accumulate or lower --schedule.batch-size"
    yield Finding("ok" if fits else "problem", "memory", f"{peak / 2**30:.2f} GiB at the worst moment{limit}{advice}")
    distilled = sum(phase_at(recipe, step).distill for step in range(steps)) / steps
    plain, full = (measured[name]["seconds_per_step"] * accumulate for name in ("student", "with_method"))
    computing, loading = plain + (full - plain) * distilled, loading * accumulate
    rate = recipe.schedule.batch_size / loading
    slow = loading > 1.1 * computing
    text = f"loads {rate:.0f} images/s, training takes about {recipe.schedule.batch_size / computing:.0f}"
    advice = f": the loader looks like the brake, raise --data.workers above {recipe.data.workers}" if slow else ""
    yield Finding("warning" if slow else "ok", "loader", text + advice)
    hours = max(loading, computing) * steps / 3600
    shown = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    pairs = f"from {quick.runtime.ledger_pairs} pairs of steps"
    yield Finding("ok", "time", f"about {shown} for {steps} steps, without evaluations, as far as told {pairs}")


def _memory(device: torch.device) -> int | None:
    """Total memory of the device, bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
