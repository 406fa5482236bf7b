"""Measures a training (AP, memory, seconds of a step), or a step of all methods in turn."""

from __future__ import annotations

import dataclasses
import json
import resource
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.environment import commit, cpu_name
from benchmarks.hosts.full import full_times
from benchmarks.hosts.plan import TEACHER_SEED, Run, Trial, images, length, settings, teacher_of
from benchmarks.hosts.records import Record
from benchmarks.hosts.runs import TRAIN, Clock, Job, times_by_method
from benchmarks.hosts.scenes import average_precision, generate, generate_other

COST_STEPS, ROUNDS = 16, 3


def measure(run: Run, trial: Trial, device: str, out: Path) -> Record:
    """The record of a run, made in this process.

    Args:
        run: the run.
        trial: sizes of a trial.
        device: "cpu" or "cuda".
        out: folder of data and weights; the run's files lie in a folder of its name.
    """
    train, val = images(trial)
    steps, rate = length(run, trial)
    teacher, start = out / teacher_of(run.host).name, out / Run(run.host, "start", TEACHER_SEED).name / "model.pt"
    if run.method == "start":
        data = generate_other(out / f"other-{train}-{val}", train, val)
    else:
        data = generate(out / f"scenes-{train}-{val}", train, val)
    job = Job(
        data, out / run.name, run.method, steps, rate, run.seed, teacher / "model.pt", device,
        start if run.needs_start else None,
    )  # fmt: skip
    record: Record = {**dataclasses.asdict(run), "settings": settings(run, trial, device)}
    if run.method == "full":
        record["seconds"] = full_times(run.host, device, data)
    else:
        record |= step_times(run.host, job) if run.method == "cost" else training(run.host, job)
    if run.needs_teacher:
        record["teacher_AP"] = json.loads((teacher / "result.json").read_text(encoding="utf-8"))["AP"]
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    package = f"{run.host} {version(run.host)}"
    return record | {"commit": commit(), "torch": torch.__version__, "package": package, "machine": machine}


def training(host: str, job: Job) -> Record:
    """AP, seconds of a step and memory of a training."""
    torch.manual_seed(job.seed)
    clock = Clock(job.device)
    detect = TRAIN[host](job, clock)
    if job.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **average_precision(job.data, detect()),
        "seconds": clock.median(),
        "steps": len(clock.ticks),
        "mebibytes": memory,
    }


def step_times(host: str, job: Job) -> Record:
    """{"seconds": {"alone", "icd", "icd reference", ...}}: the least of the medians of several short runs each."""
    steps = min(job.steps, COST_STEPS)

    def train(method: str, clock: Clock) -> None:
        TRAIN[host](dataclasses.replace(job, method=method, steps=steps), clock)

    rounds = [times_by_method(host, job.device, train) for _ in range(ROUNDS)]
    return {"seconds": {name: min(one[name] for one in rounds) for name in rounds[0]}}
