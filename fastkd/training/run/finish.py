"""The end of a run: evaluation, final files, metrics.json."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkd.data import build_eval_loader
from fastkd.detectors import save_detector
from fastkd.evaluation import CocoEvaluator, evaluator_of, print_metrics
from fastkd.evaluation.coco import evaluate
from fastkd.files import write_json, write_json_list
from fastkd.signals import Interrupted
from fastkd.training.build import Built
from fastkd.training.cost import ledger as cost
from fastkd.training.parallel.processes import Processes
from fastkd.training.run.checkpoint import save_tensors
from fastkd.training.run.diagnostics import evaluate_teachers

if TYPE_CHECKING:
    from fastkd.training.trainer import Trainer


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended.

    Args:
        status: "finished", "already finished" or "interrupted" (saved, can be resumed).
        metrics: content of metrics.json; empty if interrupted.
        run_dir: the run directory.
        exit_code: 0, or the shell's code for a signal: 130 after Ctrl-C, 143 after SIGTERM.
    """

    status: str
    metrics: dict[str, Any] = field(default_factory=dict)
    run_dir: Path = Path()
    exit_code: int = 0

    @staticmethod
    def interrupted(run_dir: Path, signum: int) -> RunResult:
        """The result of a run that a signal stopped."""
        return RunResult("interrupted", {}, run_dir, Interrupted(signum).exit_code)


class Evaluation:
    """Measures a detector on the validation set. Args: built: data and recipe; group: the processes."""

    def __init__(self, built: Built, group: Processes):
        self.built, self.group = built, group

    def run(self, detector: nn.Module, *, progress: bool) -> tuple[dict[str, Any], CocoEvaluator]:
        """Metrics of all images, and the evaluator with their detections, in every process."""
        recipe, group = self.built.recipe, self.group
        loader = build_eval_loader(
            self.built.val_set,
            batch_size=recipe.data.val_batch_size,
            world_size=group.world_size,
            rank=group.rank,
            workers=recipe.data.workers,
            short_side=recipe.data.val_short_side,
            max_side=recipe.data.max_side,
            divisor=recipe.data.divisor,
            channels_last=recipe.runtime.channels_last,
            pin_memory=group.device.type == "cuda",
        )
        evaluator = evaluator_of(self.built.val_set)
        metrics = evaluate(
            detector, loader, evaluator, device=group.device, dtype=self.built.module.dtype, progress=progress
        )
        return metrics, evaluator


def commit() -> str | None:
    """The git commit of the code, with "+" if tracked files are modified; None outside a repository."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None


def finish_run(trainer: Trainer) -> RunResult:
    """Evaluates the trained student and writes the final files; metrics.json, which marks the run finished, is last."""
    built, group, run_dir, recipe = trainer.built, trainer.group, trainer.run_dir, trainer.recipe
    module = trainer.module
    metrics, evaluator = trainer.evaluation.run(module.detector, progress=trainer.console.is_terminal)
    diagnostics = evaluate_teachers(trainer)
    unreadable = trainer.unreadable_images()
    metrics = {
        "finished": True,
        "name": recipe.name,
        **metrics,
        "steps": recipe.schedule.steps,
        "batch_size": recipe.schedule.batch_size,
        "seed": recipe.seed,
        "seconds": trainer.seconds,
        "loading": trainer.loading.summary(),
        "jumps": trainer.jumps.summary(),
        "diagnostics": diagnostics,
        "parameters": sum(p.numel() for p in module.detector.parameters()),
        "method_parameters": sum(p.numel() for p in module.distiller.parameters()) if module.distiller else 0,
        **built.notes,
        "train_unreadable": unreadable,
        "processes": group.world_size,
        "device": str(group.device),
        "torch": torch.__version__,
        "commit": commit(),
        "command": trainer.command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }

    def write() -> None:
        save_detector(module.detector, run_dir / "student.safetensors", built.train_set.class_names)
        if module.distiller is not None:
            save_tensors(run_dir / "method.safetensors", module.distiller.state_dict())
        if built.priors is not None:
            names = ("frequency", "mean", "std")
            write_json(run_dir / "priors.json", {name: getattr(built.priors, name).tolist() for name in names})
        write_json_list(run_dir / "detections.json", evaluator.iterate_results())
        write_json(run_dir / "metrics.json", metrics)

    group.on_rank0(write)
    if group.first:
        if trainer.ledger is not None:
            trainer.console.print(cost.ledger_table(recipe.name, cost.totals(recipe, trainer.ledger)))
        if unreadable:
            times = sum(unreadable.values())
            what = f"{len(unreadable)} training images could not be read, others took their place {times} times"
            trainer.console.print(f"{recipe.name}: {what}", highlight=False, markup=False)
        print_metrics({kind: metrics[kind] for kind in ("bbox", "segm") if kind in metrics}, console=trainer.console)
        trainer.console.print(f"{recipe.name}: finished, see {run_dir}", highlight=False, markup=False)
    return RunResult("finished", metrics, run_dir)
