"""The training loop: `train(recipe, run_dir)` trains, measures the cost, evaluates and writes a run directory."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastkd.data import BatchLoader, explaining_dead_workers
from fastkd.files import write_json
from fastkd.ops import use_backend
from fastkd.progress import is_quiet
from fastkd.signals import Interrupted, StopSignals
from fastkd.training.build import Built, build
from fastkd.training.config import Recipe
from fastkd.training.cost import ledger as cost
from fastkd.training.methods.phase import steps_of
from fastkd.training.optimizers import build_optimizers
from fastkd.training.parallel.compiled import compiler_settings, require_compiler
from fastkd.training.parallel.processes import Processes, check_shares, no_sync, processes
from fastkd.training.run.checkpoint import Checkpoint, load_checkpoint, recover, save_checkpoint
from fastkd.training.run.diagnostics import StepDiagnostics, evaluate_teachers
from fastkd.training.run.directory import RunDirectoryError, inspect_run_directory, open_run_directory
from fastkd.training.run.finish import Evaluation, RunResult, finish_run
from fastkd.training.run.jumps import JumpCounter
from fastkd.training.run.loading import Loading, train_loader
from fastkd.training.run.logging import Interval, RunLog, RunProgress, Stopwatch
from fastkd.training.schedule import Phase, is_logged, phase_at, step_seed
from fastkd.training.step import sum_losses
from fastkd.types import Batch


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became NaN or infinite. Nothing was saved since then; the last checkpoint is good."""


def train(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> RunResult:
    """Trains a recipe into a run directory. Under torchrun every process calls it.

    After SIGTERM or Ctrl-C it finishes the step, saves a checkpoint and returns a result with status "interrupted"
    (exit code 143 or 130); a second signal ends the process at once.

    Args:
        recipe: what to train.
        run_dir: new or empty, unless resuming.
        resume: continue the run in `run_dir` bit for bit; start it if there is none; do nothing if it is finished.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        console: prints progress and tables; None is standard error.
        command: recorded in metrics.json; None records this program's arguments.
    Returns: status, metrics and exit code.
    Raises: RunDirectoryError for another run's directory; CheckpointError if no checkpoint is intact;
        FileNotFoundError or ValueError if data, weights or teacher do not fit (all of these before the first step);
        NonFiniteLossError; LoaderError if a loader process dies.
    """
    run_dir, console = Path(run_dir), console or Console(stderr=True)
    with processes(device, recipe.runtime.timeout) as group, StopSignals() as stop:
        images = recipe.schedule.batch_size // recipe.schedule.accumulate
        check_shares(images, recipe.runtime.grad_compression, group.world_size)
        if recipe.runtime.compile:
            require_compiler(group.device)
        metrics = group.on_rank0(lambda: inspect_run_directory(run_dir, recipe, resume=resume))
        if metrics is not None:
            if group.first:
                console.print(f"{recipe.name}: {run_dir} is finished, nothing to do", markup=False)
            return RunResult("already finished", metrics, run_dir, 0)
        try:
            with stop.interrupt_at_once():
                built = build(recipe)
        except Interrupted as signal:
            console.print(f"{recipe.name}: stopped before the first step", highlight=False, markup=False)
            return RunResult.interrupted(run_dir, signal.signum)
        group.on_rank0(lambda: open_run_directory(run_dir, built.recipe))
        with _settings(built.recipe), explaining_dead_workers():
            return Trainer(built, run_dir, group, stop, console, command).run()


@contextlib.contextmanager
def _settings(recipe: Recipe) -> Iterator[None]:
    """Sets the ops' backend, the compiler and, if asked for, deterministic kernels; restores them afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if recipe.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it for deterministic cuBLAS
    torch.use_deterministic_algorithms(recipe.runtime.deterministic or before[0])
    torch.backends.cudnn.benchmark = not recipe.runtime.deterministic and len(recipe.data.short_sides) == 1
    try:
        balances = recipe.distill.balance is not None
        with use_backend(recipe.runtime.ops), compiler_settings(recipe.runtime.compile, balances):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class Trainer:
    """The state of a run in progress.

    Args:
        built: data, student, method, teacher.
        run_dir: the run directory, opened before.
        group: the processes of the run.
        stop: records SIGTERM and Ctrl-C.
        console: prints progress.
        command: recorded with the run.
    """

    def __init__(
        self, built: Built, run_dir: Path, group: Processes, stop: StopSignals, console: Console, command: str | None
    ):
        self.built, self.recipe, self.run_dir = built, built.recipe, run_dir
        self.group, self.stop, self.console, self.command = group, stop, console, command
        self.layout = torch.channels_last if self.recipe.runtime.channels_last else torch.contiguous_format
        self.module = built.module.to(group.device).to(memory_format=self.layout)
        if self.module.teacher is not None:
            self.module.teacher.to(group.device, self.layout)
        self.trainable = frozenset(name for name, p in self.module.named_parameters() if p.requires_grad)
        self.optimizers = build_optimizers(self.recipe, self.module)
        self.evaluation = Evaluation(built, group)
        self.step = 0
        self.seconds = 0.0
        self.ledger: dict[str, Any] | None = None
        self.interval = Interval()
        self.diagnostics = StepDiagnostics()
        self.jumps = JumpCounter(steps_of(self.recipe.optimizer.warmup, self.recipe.schedule.steps))
        self.phase: Phase | None = None
        self.wrapped: torch.nn.Module | None = None
        self.norms: dict[str, Tensor] = {}
        self.image_ids: list[int] = []
        self.loader: BatchLoader | None = None
        self.loading = Loading()
        self.unreadable: Counter[int] = Counter()  # image id -> failed reads before the run was resumed

    def run(self) -> RunResult:
        """Trains to the end or to a stop signal."""
        self._restore()
        stopped = self._train() if self.step < self.recipe.schedule.steps else 0
        if not stopped:
            try:
                with self.stop.interrupt_at_once():
                    return finish_run(self)
            except Interrupted as signal:
                stopped = signal.signum
        if self.group.first:
            what = f"stopped and saved after step {self.step} of {self.recipe.schedule.steps}"
            self.console.print(f"{self.recipe.name}: {what}; --resume continues it", highlight=False, markup=False)
        return RunResult.interrupted(self.run_dir, stopped)

    def _restore(self) -> None:
        path = self.group.on_rank0(lambda: recover(self.run_dir / "checkpoints", self.recipe.runtime.keep_last))
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        state = checkpoint.state
        if state["teacher_sha256"] != self.built.teacher_sha256:
            raise RunDirectoryError(
                f"resume: teacher must be the file the run began with, got another content in {self.recipe.teacher}; "
                "restore it or choose another --run-dir"
            )
        if state["data"] != self.built.data_state:
            raise RunDirectoryError(
                f"resume: data must be what the run began with ({state['data']}), got {self.built.data_state}; "
                "restore it or choose another --run-dir"
            )
        self.module.load_state_dict(checkpoint.model)
        for optimizer in self.optimizers:
            optimizer.load_tensors(checkpoint.optimizer)
        self.step, self.seconds, self.ledger = checkpoint.step, state["seconds"], state["ledger"]
        self.interval.load_state(state["interval"], self.group.device)
        if "jumps" in state:  # older checkpoints have neither
            self.jumps.load_state(state["jumps"])
        self.module.balance.load_state(state.get("balance", {}))
        self.unreadable = Counter({int(image_id): times for image_id, times in state["unreadable"].items()})
        if self.group.first and not is_quiet():
            self.console.print(f"{self.recipe.name}: resuming after step {self.step}", highlight=False, markup=False)

    def _train(self) -> int:
        """Steps until the end; returns the signal that stopped it, or 0. The last step taken is always saved."""
        log = RunLog(self.run_dir, self.step) if self.group.first else None
        self.progress = RunProgress(
            self.recipe.name, self.recipe.schedule.steps, self.step, self.console, self.group.first
        )
        try:
            if self.group.broadcast(log is not None and not log.evaluated) and self._evaluation_is_due():
                self._evaluate(log)  # the run was stopped between checkpoint and evaluation
            self.loader = train_loader(self.built, self.group, self.step)
            with contextlib.closing(iter(self.loader)) as batches:
                return self._take_steps(batches, log)
        except Interrupted as signal:  # during an evaluation, after saving
            return signal.signum
        finally:
            self.progress.close()
            self.wrapped = None
            if log is not None:
                log.close()

    def _take_steps(self, batches: Iterator[Batch], log: RunLog | None) -> int:
        """Trains to the end or to a signal, and logs, saves and evaluates when due; returns the signal or 0."""
        recent: deque[list[Batch]] = deque(maxlen=min(cost.BATCHES, self.recipe.runtime.ledger_pairs))
        watch = Stopwatch(self.seconds)
        while self.step < self.recipe.schedule.steps:
            with watch.waiting():
                parts = [next(batches) for _ in range(self.recipe.schedule.accumulate)]
            stopped = self._take_step(parts)
            watch.steps += 1
            if self.ledger is None:
                recent.append(parts)
            self.progress.advance()
            due = self._due(stopped)
            if due:
                watch.pause()
                self.seconds = watch.total
                self.jumps.warn(self.recipe, self.group, self.console)
                if "log" in due:
                    self._log(log, *watch.take_lap())
                if "ledger" in due:
                    self._measure_cost(list(recent))
                    recent.clear()  # frees the batches
                if "checkpoint" in due:
                    self._save()
                if "evaluation" in due:
                    self._evaluate(log)
                watch.resume()
            if stopped:
                return stopped
        return 0

    def _due(self, stopped: int) -> set[str]:
        """The actions due after this step, a subset of "log", "ledger", "checkpoint", "evaluation"."""
        runtime, steps = self.recipe.runtime, self.recipe.schedule.steps
        ledger_step = min(steps - 1, max(10, steps // 10))
        wants_ledger = runtime.ledger_pairs > 0 and self.ledger is None and self.step >= ledger_step
        evaluates = self._evaluation_is_due() and not stopped
        saves = stopped or evaluates or self.step == steps or self.step % runtime.checkpoint_every == 0
        due = {
            "log": is_logged(self.recipe, self.step),
            "ledger": wants_ledger and not stopped,
            "checkpoint": saves,
            "evaluation": evaluates,
        }
        return {name for name, wanted in due.items() if wanted}

    def _evaluation_is_due(self) -> bool:
        """Whether an intermediate evaluation is due: every few steps, and after the last step of a method like LGD."""
        every = self.recipe.runtime.eval_every
        before, after = (self.module.instructing(phase_at(self.recipe, step)) for step in (self.step - 1, self.step))
        due = (every > 0 and self.step % every == 0) or before.keys() > after.keys()
        return due and 0 < self.step < self.recipe.schedule.steps

    def unreadable_images(self) -> dict[str, int]:
        """Failed reads so far of each training image that could not be read, by image id; all processes call it."""
        counts = Counter(self.unreadable)
        for theirs in self.group.gather(dict(self.loader.bad_images) if self.loader is not None else {}):
            counts.update(theirs)
        return {str(image_id): times for image_id, times in sorted(counts.items())}

    def _enter(self, phase: Phase) -> None:
        """Applies a phase; wraps the module in DDP anew if requires_grad changed."""
        changed = self.module.apply_phase(phase, self.trainable)
        if changed or self.wrapped is None:
            self.wrapped = None  # remove the old gradient hooks before DDP registers new ones
            self.wrapped = self.group.wrap_for(self.recipe, self.module)
        self.phase = phase

    def _take_step(self, parts: list[Batch]) -> int:
        """Forward, backward and update; returns the signal on which all processes agree to stop, or 0."""
        phase = phase_at(self.recipe, self.step)
        if phase != self.phase:
            self._enter(phase)
        assert self.wrapped is not None
        self.module.balance.begin(self.step, self.group.mean)
        torch.manual_seed(step_seed(self.recipe.seed, self.step, self.group.rank))
        rates = {o.name: o.set_rate(self.step, self.recipe.schedule.steps) for o in self.optimizers}
        self.module.measures = is_logged(self.recipe, self.step + 1)
        stopped = 0
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(parts, start=1):
            batch = batch.to(self.group.device, non_blocking=True, memory_format=self.layout)
            with no_sync(self.wrapped, number < len(parts)):
                losses = self.wrapped(batch, phase)
                total = sum_losses(losses)
                stopped = max(stopped, self._check(total, losses, batch))
                (total / len(parts)).backward()
            self.diagnostics.add(self.module.diagnostics)
            for name, value in {"loss": total, **losses}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(parts)
        self.norms = {f"grad_norm/{o.name}": o.step() for o in self.optimizers}
        self.image_ids = [image_id for batch in parts for image_id in batch.image_ids]
        self.step += 1
        self.rates = rates
        self.interval.add({**sums, **self.norms})
        self.jumps.add(sum_losses({name: sums[name] for name in self.module.detector_losses}))
        return stopped

    def _check(self, total: Tensor, losses: dict[str, Tensor], batch: Batch) -> int:
        """Checks in all processes that losses and last gradients are finite; returns the stop signal or 0.

        Raises: NonFiniteLossError in every process; for a loss, before any of them updates its weights.
        """
        values = torch.stack([total.detach(), *(norm.to(total.dtype) for norm in self.norms.values())])
        bad = float(not torch.isfinite(values).all().item())  # the only device synchronisation of a step
        bad, stopped = self.group.all_reduce_max([bad, float(self.stop.received)])
        if bad:
            self._raise_non_finite(losses, batch)
        return int(stopped)

    def _raise_non_finite(self, losses: dict[str, Tensor], batch: Batch) -> None:
        norms = {name: norm.item() for name, norm in self.norms.items()}
        if not all(map(math.isfinite, norms.values())):
            fp16 = self.recipe.runtime.grad_compression == "fp16"  # overflows beyond 65504 in the all-reduce
            more = " or --runtime.grad-compression bf16" if fp16 else ""
            ids = [image_id for ids in self.group.gather(self.image_ids) for image_id in ids]
            raise NonFiniteLossError(
                f"train: gradients must be finite, got {norms} at step {self.step}, whose losses were finite, "
                f"image ids {ids}; lower the learning rate or use --runtime.precision float32{more}"
            )
        found = self.group.gather(({name: value.item() for name, value in losses.items()}, list(batch.image_ids)))
        names = sorted({name for values, _ in found for name, value in values.items() if not math.isfinite(value)})
        faulty = [ids for values, ids in found if not all(map(math.isfinite, values.values()))]
        raise NonFiniteLossError(
            f"train: losses must be finite, got NaN or infinity at step {self.step + 1} in {names or ['the sum']} "
            f"(values {[values for values, _ in found]}), image ids {[i for ids in faulty for i in ids]} "
            f"(whole batch: {[i for _, ids in found for i in ids]}); the weights were not updated: lower the learning "
            "rate, clip gradients or look at these images"
        )

    def _log(self, log: RunLog | None, seconds: float, waited: float, steps: int) -> None:
        assert self.loader is not None
        means = self.interval.take()
        values = [*means.values(), self.loader.take_rate()]
        *values, rate = self.group.mean(torch.tensor(values, dtype=torch.float64)).tolist()
        means = dict(zip(means, values))
        (waited,) = self.group.all_reduce_max([waited])  # the slowest process holds up the others
        images, rate = self.recipe.schedule.batch_size * steps, rate * self.group.world_size
        diagnostics = self.diagnostics.take(self.group.mean)
        loading = self.loading.add(images, steps, seconds, waited, rate)
        if log is None:
            return
        record = {
            "step": self.step,
            "loss": means.pop("loss"),
            "losses": {name: value for name, value in means.items() if not name.startswith("grad_norm/")},
            "lr": self.rates,
            "grad_norm": {n.removeprefix("grad_norm/"): v for n, v in means.items() if n.startswith("grad_norm/")},
            "jumps": len(self.jumps.found),
            "diagnostics": diagnostics,
            **self.module.balance.report(),
            **loading,
        }
        log.write(record)
        self.progress.report(record)

    def _save(self) -> None:
        """Saves a checkpoint of this step; the other processes wait until it is written."""
        state = {
            "seconds": self.seconds,
            "interval": self.interval.state(self.group.mean),
            "jumps": self.jumps.state(),
            "balance": self.module.balance.state(),
            "ledger": self.ledger,
            "teacher_sha256": self.built.teacher_sha256,
            "data": self.built.data_state,
            "unreadable": self.unreadable_images(),
            "processes": self.group.world_size,
            "torch": torch.__version__,
        }
        optimizer = {name: tensor for each in self.optimizers for name, tensor in each.tensors().items()}
        checkpoint = Checkpoint(self.step, self.module.state_dict(), optimizer, state)
        folder, keep = self.run_dir / "checkpoints", self.recipe.runtime.keep_last
        self.group.on_rank0(lambda: str(save_checkpoint(folder, checkpoint, keep)))

    def _measure_cost(self, batches: list[list[Batch]]) -> None:
        with self.progress.paused():
            measured = cost.measure(self.recipe, self.module, self.trainable, batches, self.group)
        self.ledger = ledger = self.group.broadcast(measured)
        self.group.on_rank0(lambda: write_json(self.run_dir / "ledger.json", cost.totals(self.recipe, ledger)))

    def _evaluate(self, log: RunLog | None) -> None:
        with self.progress.paused(), self.stop.interrupt_at_once():
            metrics, _ = self.evaluation.run(self.module.detector, progress=self.console.is_terminal)
            diagnostics = evaluate_teachers(self)
        self.phase = None  # evaluation changed the detector's modes: apply the phase again
        if log is not None:
            record: dict[str, Any] = {"step": self.step, "diagnostics": diagnostics}
            for kind, values in metrics.items():
                record[kind] = {name: value for name, value in values.items() if name != "per_class"}
            log.write(record)
