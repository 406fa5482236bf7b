"""The measurement of one problem: all its candidates, interleaved, in a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import memory
from benchmarks.step.candidates import FORMS, Candidate, Problem, build
from benchmarks.step.dispatch_ledger import DispatchLedger, count

CPU = torch.device("cpu")
LONE = {"fgfi": "float32", "teacher": "float32"}  # for the cost ledger: one form each, on a detector's first problem
TRIED = {("student", "recompute"), ("lgd", "recompute"), *((method, "compile") for method in ("student", "lgd", "icd"))}


def candidates(methods: list[str], forms: list[str], *, lone: bool, tried: bool) -> list[tuple[str, str]]:
    """(method, form) pairs of a problem. Args: lone, tried: include those of LONE and of TRIED."""
    of_each = [(method, form) for method in methods for form in forms if method not in LONE]
    found = [pair for pair in of_each if pair[1] in FORMS]
    more = sorted(LONE.items()) * lone + sorted(TRIED) * tried
    return found + [pair for pair in more if pair[0] in methods and pair[1] in forms]


def resident(candidate: Candidate) -> int:
    """Bytes of weights, statistics, optimiser states and the frozen teacher."""
    return sum(tensor.numel() * tensor.element_size() for tensor in candidate.resident())


def first_turn(candidate: Candidate) -> dict[str, Any]:
    """Ledger, memory and seconds of one step (counting adds about one per cent)."""
    if candidate.compiled:  # a dispatch mode would see the operators of graphs, not their kernels
        return {
            "seconds": [],
            "transient_bytes": memory.measure(candidate.step, CPU).peak,
            "resident_bytes": resident(candidate),
        }
    seconds = []

    def work() -> None:
        begin = time.perf_counter()
        with DispatchLedger() as found:
            candidate.step()
        seconds.append(time.perf_counter() - begin)
        seconds.append(found.counts)

    peak = memory.measure(work, CPU).peak
    entry = {"seconds": [seconds[0]], "ledger": dataclasses.asdict(seconds[1])}
    if candidate.teacher is not None:
        entry["teacher_ledger"] = dataclasses.asdict(count(candidate.teacher))
    return {**entry, "transient_bytes": peak, "resident_bytes": resident(candidate)}


def measure(
    problem: Problem, chosen: argparse.Namespace, *, first: bool, counted: bool, tried: bool = False
) -> dict[str, Any]:
    """Measure all candidates of a problem, interleaved.

    Args:
        first: whether it is the first problem of its detector: more repetitions, and the runs of the cost ledger.
        tried: include the trainer's options.
        counted: count the first round; else the first round is an untimed step on small images.
    """
    entries, runners = {}, {}
    small = dataclasses.replace(problem, height=min(128, problem.height), width=min(192, problem.width))
    for method, form in candidates(chosen.methods, chosen.forms, lone=first, tried=tried):
        runners[method, form] = runner = build(problem, method, form)
        if runner.compiled:
            runner.step()  # static graphs are compiled for the first size
        else:
            runner.on(small.batch(), runner.step)  # creates the optimiser states
        entries[f"{method}/{form}"] = first_turn(runner) if counted else {"seconds": []}
    turns = chosen.repetitions if first else chosen.repetitions - counted - 1
    for turn in range(max(turns, 1 - counted)):
        order = list(runners) if turn % 2 == 0 else list(reversed(runners))
        for method, form in order:
            gc.collect()
            entries[f"{method}/{form}"]["seconds"].append(runners[method, form].timed())
    return {**dataclasses.asdict(problem), "entries": entries}


def measure_apart(*arguments: Any, threads: int, **options: Any) -> dict[str, Any]:
    """`measure` in a new process: the memory of a problem, kept by the allocator, is not the next one's.

    Raises: BrokenProcessPool if the process was killed, as by a machine without memory.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(measure, *arguments, **options).result()
