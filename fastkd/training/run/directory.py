"""The run directory: whether it may be used, and whether it holds a run of the same recipe. Its files:

recipe.json  log.jsonl  tensorboard/  checkpoints/  student.safetensors  method.safetensors
priors.json  teacher.json  metrics.json  ledger.json  detections.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkd.files import is_leftover, remove_leftovers, write_json
from fastkd.training.config import Recipe, complete

# Fields that never change the result of a run: they may differ when it is resumed.
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
    """The differences of two JSON values: dotted name -> (value in one, value in other)."""
    if isinstance(one, dict) and isinstance(other, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*one, *(key for key in other if key not in one)]:
            name = f"{where}.{key}" if where else key
            found |= differing_fields(one.get(key), other.get(key), name)
        return found
    return {} if one == other else {where: (one, other)}


def inspect_run_directory(path: Path, recipe: Recipe, *, resume: bool) -> dict[str, Any] | None:
    """Checks a run directory before the data set is opened.

    Args:
        path: the run directory, which need not exist.
        recipe: the recipe to train, before it is resolved against the data.
        resume: whether to continue the run in `path`.
    Returns: metrics.json if the run in `path` is finished, else None.
    Raises: RunDirectoryError if the directory is not empty and `resume` is False, or if it holds anything but a run of
        this recipe.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"train: run directory must be a folder, got the file {path}; choose another --run-dir")
    if not path.is_dir() or all(is_leftover(item.name) for item in path.iterdir()):  # killed before recipe.json
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
    # The stored recipe has the data set's number of classes, which is not known before the data set is opened.
    check_same_recipe(path, recipe, ignore=("detector.num_classes",) if recipe.data.match_classes else ())
    metrics = read_json(path / "metrics.json")
    return metrics if isinstance(metrics, dict) and metrics.get("finished") else None


def open_run_directory(path: Path, recipe: Recipe) -> None:
    """Makes the directory with recipe.json; if that file exists, checks that it holds this recipe.

    Args:
        path: the run directory, checked by `inspect_run_directory`.
        recipe: resolved against the data.
    """
    if (path / "recipe.json").is_file():
        check_same_recipe(path, recipe)
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    write_json(path / "recipe.json", recipe.to_dict())


def check_same_recipe(path: Path, recipe: Recipe, *, ignore: tuple[str, ...] = ()) -> None:
    """Compares a recipe with the one stored in a run directory.

    Args:
        path: the run directory.
        recipe: the recipe asked for.
        ignore: dotted names of further fields that may differ, besides RESUME_MAY_CHANGE.
    Raises: RunDirectoryError with name and both values of every field that differs.
    """
    stored = path / "recipe.json"
    try:
        before = complete(json.loads(stored.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"train: {stored} must be JSON, got {error}; choose another --run-dir") from error
    different = differing_fields(before, json.loads(json.dumps(recipe.to_dict())))
    different = {name: values for name, values in different.items() if name not in (*RESUME_MAY_CHANGE, *ignore)}
    if different:
        listed = ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in different.items())
        raise RunDirectoryError(
            f"train: {path} must hold a run of the same recipe, got other fields ({listed}); choose another --run-dir"
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no such file.

    Raises: RunDirectoryError if it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"train: {path} must be JSON, got {error}; delete it or restore it") from error
