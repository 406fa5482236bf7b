"""The runs of the hosts' table and all settings on which a run depends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.integrations.methods import METHODS as OURS
from fastkd.integrations.optimizer import rate_for

SIDE, CLASSES, BATCH = 128, 10, 8
TEACHER_SEED = 0
HOSTS = ("torchvision", "lightning", "transformers", "ultralytics")
METHODS = {host: ("alone", "icd", "lgd") for host in HOSTS} | {"ultralytics": ("alone", "icd", "lgd", "own")}
OWN = "own"  # Ultralytics' built-in distillation
TAUGHT = ("icd", OWN, "cost")  # need the teacher's file
UNSTARTED = ("teacher", "start", "cost", "full")  # do not begin with the pretrained student
FULL = ("torchvision", "transformers", "ultralytics")  # hosts timed at full size; Lightning has torchvision's
START_CLASSES = 5  # of the scenes on which students are pretrained: their classes, two by two
# As in the Scenes recipe, from docs/results/findings.md: in short runs with AdamW the published weights of 1 cost AP.
LGD_SETTINGS = {"weight": 0.25, "instructive_weight": 0.1}
SETTINGS = {"lgd": LGD_SETTINGS, "cost": LGD_SETTINGS}


@dataclass(frozen=True)
class Recipe:
    """A host's detectors and the length of its runs; the same for all methods.

    Args:
        student, teacher: the detectors in words, for the page.
        steps, teacher_steps: optimiser steps.
        rate, teacher_rate: learning rates; None: the host's default.
        start_steps: optimiser steps of pretraining the student, once, on other scenes with other classes; 0: the
            student begins with a pretrained backbone.
    """

    student: str
    teacher: str
    steps: int
    teacher_steps: int
    rate: float | None
    teacher_rate: float | None
    start_steps: int = 0


SMALL = "ResNet-18 of a quarter of the width, pretrained on other scenes, pyramid of 64 channels"
LARGE = "ResNet-34 of three eighths of the width, pretrained on scenes, pyramid of 64 channels"
RECIPES = {
    "torchvision": Recipe(f"FCOS, {SMALL}", f"FCOS, {LARGE}", 500, 600, 1.5e-3, 1e-3),
    "lightning": Recipe(f"RetinaNet, {SMALL}", f"RetinaNet, {LARGE}", 500, 600, 1.5e-3, 1e-3),
    "transformers": Recipe(
        "RT-DETR, stages of 16 to 96 channels, one block each, width 64, 100 queries",
        f"torchvision's, FCOS, {LARGE}", 1000, 600, 4e-4, 1e-3, 3000,
    ),
    "ultralytics": Recipe(
        "YOLO11 of an eighth of the width, without mosaics", "YOLO11n, without mosaics", 1000, 3000, None, None, 3000
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """Sizes for a trial of the command in place of the table's; None keeps those.

    Args:
        steps: optimiser steps of students and teacher.
        train, val: images.
    """

    steps: int | None = None
    train: int | None = None
    val: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))


@dataclass(frozen=True)
class Run:
    """A run of the table.

    Args:
        host: of HOSTS.
        method: one of METHODS[host], "teacher", "start" (pretrains the student), "cost" (the times of a step), or
            "full" (the same at full size).
        seed: of all random numbers.
    """

    host: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.host}-{self.method}-seed{self.seed}"

    @property
    def needs_teacher(self) -> bool:
        return self.method in TAUGHT

    @property
    def needs_start(self) -> bool:
        return RECIPES[self.host].start_steps > 0 and self.method not in UNSTARTED


def teacher_of(host: str) -> Run:
    """The run that trains a host's teacher; RT-DETR would need more steps than a CPU allows for a good one."""
    return Run("torchvision" if host == "transformers" else host, "teacher", TEACHER_SEED)


def length(run: Run, trial: Trial) -> tuple[int, float | None]:
    """Optimiser steps and learning rate of a run."""
    recipe = recipe_of(run.host, trial)
    if run.method == "teacher":
        return recipe.teacher_steps, recipe.teacher_rate
    if run.method == "start":
        return recipe.start_steps, recipe.rate
    return recipe.steps, recipe.rate


def images(trial: Trial) -> tuple[int, int]:
    """Numbers of training and validation images."""
    return trial.train or 4000, trial.val or 300


def recipe_of(host: str, trial: Trial) -> Recipe:
    """The recipe of a host at the size of a trial."""
    recipe = RECIPES[host]
    if trial.steps is None:
        return recipe
    start = trial.steps if recipe.start_steps else 0
    return dataclasses.replace(recipe, steps=trial.steps, teacher_steps=trial.steps, start_steps=start)


def settings(run: Run, trial: Trial, device: str) -> dict[str, Any]:
    """All that a run depends on besides the code: a run recorded with other settings is made again."""
    if run.method == "full":
        return {"device": device}
    recipe = dataclasses.asdict(recipe_of(run.host, trial))
    of_teacher = {name: value for name, value in recipe.items() if name.startswith("teacher")}
    of_student = {name: value for name, value in recipe.items() if name not in of_teacher}
    if not run.needs_start and run.method != "start":
        del of_student["start_steps"]
    if run.method == "teacher":
        of_student = {}
    elif not run.needs_teacher:
        of_teacher = {}
    if run.method == "start":
        del of_student["steps"]
    of_method: dict[str, Any] = {**SETTINGS.get(run.method, {})}
    if run.method in OURS:
        of_method["method_rate"] = rate_for(of_student["steps"])  # what the hosts take for themselves
    train, val = images(trial)
    return {
        **of_student,
        **of_teacher,
        **of_method,
        "train": train,
        "val": val,
        "side": SIDE,
        "batch": BATCH,
        "device": device,
    }


def all_runs(hosts: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Every run of the table, host by host and seed by seed, without teachers and pretrained students."""
    for host in hosts:
        for seed in seeds:
            yield from (Run(host, method, seed) for method in METHODS[host])
        yield Run(host, "cost", TEACHER_SEED)
        if host in FULL:
            yield Run(host, "full", TEACHER_SEED)
