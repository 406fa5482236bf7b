"""A run's folder: may we write here, is it the same recipe, what is stored beside the checkpoints.

recipe.json  log.jsonl  tensorboard/  checkpoints/  student.safetensors  method.safetensors
priors.json  metrics.json  ledger.json  detections.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkd.files import write_json
from fastkd.training.config import Recipe

# Fields that change how a run is carried out and never its result: they may differ when it is resumed.
RESUME_MAY_CHANGE = (
    "data.workers",
    "data.prefetch",
    "data.val_batch_size",
    "runtime.timeout",
    "runtime.log_every",
    "runtime.checkpoint_every",
    "runtime.keep_last",
    "runtime.eval_every",
    "runtime.ledger_pairs",
)


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used for this run."""


def differing_fields(one: Any, other: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in one, value in other) of everything in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*one, *(key for key in other if key not in one)]:
            name = f"{where}.{key}" if where else key
            found |= differing_fields(one.get(key), other.get(key), name)
        return found
    return {} if one == other else {where: (one, other)}


def look_into(path: Path, recipe: Recipe, *, resume: bool) -> dict[str, Any] | None:
    """What can be said of a run directory before the data is opened.

    Args:
        path: the run directory, which need not exist.
        recipe: as asked for.
        resume: whether to continue what is there.
    Returns: metrics.json of a finished run of this recipe, which leaves nothing to do; else None.
    Raises: RunDirectoryError if it holds something and `resume` is False, something that is no run, or another
        recipe's run.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"train: run directory must be a folder, got the file {path}; choose another --run-dir")
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if not resume:
        raise RunDirectoryError(
            f"train: run directory must be new or empty, got {path} with files in it; "
            "pass --resume to continue it, or choose another --run-dir"
        )
    if not (path / "recipe.json").is_file():
        raise RunDirectoryError(
            f"train: run directory must hold recipe.json to be resumed, got {path} without it; choose another --run-dir"
        )
    # The stored recipe has the number of classes of the data, which nobody has opened yet.
    check_same_recipe(path, recipe, ignore=("detector.num_classes",) if recipe.data.match_classes else ())
    metrics = read_json(path / "metrics.json")
    return metrics if metrics is not None and metrics.get("finished") else None


def open_run_directory(path: Path, recipe: Recipe) -> None:
    """Makes the directory with recipe.json, or checks once more that what is there is of this recipe.

    Args:
        path: the run directory, looked into before.
        recipe: as resolved against the data.
    """
    if (path / "recipe.json").is_file():
        check_same_recipe(path, recipe)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "recipe.json", recipe.to_dict())


def check_same_recipe(path: Path, recipe: Recipe, *, ignore: tuple[str, ...] = ()) -> None:
    """Compares a recipe with the one stored in a run directory.

    Args:
        path: the run directory.
        recipe: the recipe asked for.
        ignore: dotted names of fields that may differ besides RESUME_MAY_CHANGE.
    Raises: RunDirectoryError naming every field that differs, with both values.
    """
    stored = path / "recipe.json"
    try:
        before = json.loads(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"train: {stored} must be JSON, got {error}; choose another --run-dir") from error
    different = differing_fields(before, json.loads(json.dumps(recipe.to_dict())))
    different = {name: values for name, values in different.items() if name not in (*RESUME_MAY_CHANGE, *ignore)}
    if different:
        listed = ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in different.items())
        raise RunDirectoryError(
            f"train: {path} must hold a run of the same recipe, got other fields ({listed}); choose another --run-dir"
        )


def read_json(path: Path) -> Any:
    """A JSON file's content; None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
