"""SIGKILL at random moments of a run in one process, and of one of two processes under torchrun's agent."""

from __future__ import annotations

import mmap
import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.faults import tiny
from fastkd.training import Recipe
from fastkd.training import trainer as trainer_module
from fastkd.training.run import finish as finish_module

PHASES = ("start", "building", "training", "saving", "evaluating", "writing the results", "ended")
MOST_KILLS = 3  # of one run
SAVING, SAVING_SECONDS = 0.45, 0.02  # some kills meant for a saving come after it: so a third of all are within one


class Watch:
    """Shared memory in which the processes of a run note what they are doing, and a pipe that tells of each saving."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)
        self.read_end, self.write_end = os.pipe()

    def close(self) -> None:
        """Frees memory and pipe."""
        self.memory.close()
        os.close(self.read_end)
        os.close(self.write_end)

    @property
    def phase(self) -> str:
        """The phase that the process entered last."""
        return PHASES[self.memory[0]]

    def pid(self, rank: int) -> int:
        """The process with this rank, 0 before it started."""
        return int.from_bytes(self.memory[8 + 8 * rank : 16 + 8 * rank], "little")

    def enter(self, rank: int) -> None:
        """Notes the calling process."""
        self.memory[8 + 8 * rank : 16 + 8 * rank] = os.getpid().to_bytes(8, "little")

    def install(self) -> None:
        """Makes the parts of a run note their phase, in this process."""
        self._note(trainer_module, "build", "building")
        self._note(trainer_module.Trainer, "_train", "training")
        self._note(trainer_module, "save_checkpoint", "saving")
        self._note(finish_module.Evaluation, "run", "evaluating")
        self._note(trainer_module, "finish_run", "writing the results")

    def _note(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def noting(*args: Any, **options: Any) -> Any:
            before, self.memory[0] = self.memory[0], PHASES.index(phase)
            if phase == "saving":
                os.write(self.write_end, b"s")
            try:
                return original(*args, **options)
            finally:
                self.memory[0] = before

        setattr(owner, name, noting)


def kill_once(start: Callable[[], int], watch: Watch, rng: random.Random, seconds: float, saving: bool) -> str | None:
    """Starts a process and kills it; returns the phase it was in, None if it ended before.

    Args:
        start: starts it and returns its id.
        seconds: duration of an undisturbed run; the moment is uniform in it.
        saving: kill during the saving of a checkpoint instead: a uniform moment in the SAVING_SECONDS after it began.
    """
    watch.memory[0] = 0
    while select.select([watch.read_end], [], [], 0)[0]:
        os.read(watch.read_end, 64)
    pid = start()
    if saving:
        ended = os.pidfd_open(pid)
        for _ in range(rng.randint(1, 4)):  # a later one is not reached where the run ends before
            if watch.read_end not in select.select([watch.read_end, ended], [], [], tiny.PATIENCE)[0]:
                break
            os.read(watch.read_end, 1)
        os.close(ended)
        time.sleep(rng.uniform(0, SAVING_SECONDS))
    else:
        time.sleep(rng.uniform(0, seconds))
    phase = watch.phase
    os.kill(pid, signal.SIGKILL)
    return phase if tiny.wait(pid) == -signal.SIGKILL else None


def one_process(folder: Path, wanted: Recipe, seed: int) -> Iterator[dict[str, Any]]:
    """Runs that are killed up to three times and resumed; yields the phases of the kills and the difference in the end.

    Args:
        folder: for the runs; holds `whole`, the undisturbed one, afterwards.
        seed: of the first run; the n-th one has seed + n.
    """
    reference, seconds = undisturbed(folder, wanted)
    output = folder / "output"
    while True:
        rng = random.Random(seed)
        watch, run_dir, phases = Watch(), folder / f"killed-{seed}", []

        def attempt(run_dir: Path = run_dir, watch: Watch = watch) -> int:
            watch.install()
            return tiny.run(wanted, run_dir)

        for _ in range(rng.randint(1, MOST_KILLS)):
            saving = rng.random() < SAVING
            phase = kill_once(lambda attempt=attempt: tiny.fork(attempt, output), watch, rng, seconds, saving)
            if phase is None:
                break
            phases.append(phase)
        ended = tiny.call(attempt)
        problem = f"exit code {ended.code}: {ended.last}" if ended.code else ""
        problem = problem or tiny.difference(reference, tiny.result(run_dir))
        watch.close()
        if not problem:
            shutil.rmtree(run_dir)
        yield {"seed": seed, "phases": phases, "problem": problem}
        seed += 1


def undisturbed(folder: Path, wanted: Recipe, processes: int = 1) -> tuple[dict[str, Any], float]:
    """Result and seconds of the undisturbed run, made anew."""
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    start = (lambda: tiny.run(wanted, whole)) if processes == 1 else (lambda: launch(wanted, whole, Watch()))
    ended = tiny.call(start)
    if ended.code:
        raise RuntimeError(f"faults: the undisturbed run must end with 0, got {ended.code}: {ended.said[-2000:]}")
    return tiny.result(whole), ended.seconds


def worker(wanted: Recipe, run_dir: Path, watch: Watch) -> int:
    """One of the two processes that torchrun's agent forks."""
    rank = int(os.environ["RANK"])
    watch.enter(rank)
    if rank == 0:
        watch.install()
    code = tiny.run(wanted, run_dir)
    watch.memory[0] = PHASES.index("ended")
    if code:
        raise SystemExit(code)
    return code


def launch(wanted: Recipe, run_dir: Path, watch: Watch) -> int:
    """torchrun --nproc-per-node 2 --max-restarts 3 in this process, with workers that are forked, not started."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=str(os.getpid()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=3, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, worker)(wanted, run_dir, watch)
    return 0


def one_of_two(folder: Path, wanted: Recipe, seed: int) -> Iterator[dict[str, Any]]:
    """Runs of two processes, one of which is killed at a random moment; the agent restarts both. As `one_process`."""
    reference, seconds = undisturbed(folder, wanted, 2)
    while True:
        rng = random.Random(seed)
        watch, run_dir, rank = Watch(), folder / f"two-{seed}", rng.randint(0, 1)
        output = folder / "output-two"
        agent = tiny.fork(lambda run_dir=run_dir, watch=watch: launch(wanted, run_dir, watch), output)
        end = time.monotonic() + tiny.PATIENCE
        while not watch.pid(rank) and time.monotonic() < end:
            time.sleep(0.002)
        if rng.random() < 1 / 3 and select.select([watch.read_end], [], [], tiny.PATIENCE)[0]:
            time.sleep(rng.uniform(0, SAVING_SECONDS))
        else:
            time.sleep(rng.uniform(0, 0.8 * seconds))
        phase, pid = watch.phase, watch.pid(rank)
        killed = bool(pid) and phase != "ended"
        if killed:
            os.kill(pid, signal.SIGKILL)
        code = tiny.wait(agent)
        said = output.read_text(encoding="utf-8", errors="replace")
        problem = f"exit code {code}: {said[-1500:]}" if code else ""
        problem = problem or tiny.difference(reference, tiny.result(run_dir))
        watch.close()
        if not problem:
            shutil.rmtree(run_dir)
        yield {"seed": seed, "phases": [f"rank {rank}, rank 0 {phase}"] if killed else [], "problem": problem}
        seed += 1


def add(figures: dict[str, Any], trial: dict[str, Any]) -> None:
    """Adds a trial to the figures of a campaign: next seed, runs, kills, kills by phase, problems."""
    figures["next_seed"] = trial["seed"] + 1
    figures["runs"] = figures.get("runs", 0) + 1
    figures["kills"] = figures.get("kills", 0) + len(trial["phases"])
    phases = Counter(figures.get("phases", {}))
    phases.update(trial["phases"])
    figures["phases"] = dict(sorted(phases.items()))
    if trial["problem"]:
        figures.setdefault("problems", []).append({"seed": trial["seed"], "problem": trial["problem"]})
