"""Reads run directories for the report. A missing or broken file adds a note to the report and never raises."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.assets import PREFIX
from fastkd.files import read_json_lines
from fastkd.progress import track
from fastkd.report.results import Results, to_results

NOT_OF_A_TEACHER = ("log.jsonl is missing", "ledger.json is missing")  # a shipped teacher has only been evaluated


@dataclass
class Run:
    """The readable contents of a run directory.

    Args:
        path: the run directory.
        name: name in tables and pictures; unique among the runs of a report.
        recipe, metrics, ledger: contents of the JSON files with these names; {} if missing.
        log: the records of log.jsonl in order.
        detections: content of detections.json; None if missing.
        notes: one sentence for each missing or malformed file.
        methods: settings classes of the distillation methods, by kind.
    """

    path: Path
    name: str
    recipe: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    ledger: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    detections: Results | None = None
    notes: list[str] = field(default_factory=list)
    is_teacher: bool = False
    methods: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The kind of the method, or None for a detector trained alone."""
        method = self.recipe.get("method")
        if not isinstance(method, dict):
            return None
        return str(method.get("kind") or "unknown method")

    @property
    def inherits(self) -> bool:
        """Whether the student's neck and head were initialised from the teacher."""
        return bool(self.recipe.get("inherit"))

    @property
    def role(self) -> str:
        """A short description of the run: teacher, baseline, inheriting alone, or the method."""
        if self.is_teacher:
            return "teacher"
        if self.method is None:
            return "inheriting alone" if self.inherits else "baseline"
        label = self.settings.label if self.settings is not None else self.method
        return label + (" + inheriting" if self.inherits else "")

    @property
    def settings(self) -> Any:
        """The class of the method's settings (a fastkd.training.methods.Method); None if unknown."""
        return self.methods.get(self.method) if self.method is not None else None

    @property
    def detector(self) -> dict:
        """The detector's configuration; {} if unknown."""
        detector = self.recipe.get("detector")
        return detector if isinstance(detector, dict) else {}

    def score(self, *keys: str) -> float | None:
        """The number at metrics[keys...]; None if it is absent, not a number, or COCO's -1 ("no such boxes")."""
        value = self.metrics
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return number(value, minimum=0.0)


def number(value, minimum: float = -math.inf) -> float | None:
    """`value` as a finite float of at least `minimum`, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max and value >= minimum else None  # int of any size, NaN


def load_run(path: Path, name: str | None = None, methods: Mapping[str, Any] | None = None) -> Run:
    """Reads one run directory.

    Args:
        path: the directory.
        name: name in the report; None takes the directory's.
        methods: as in `Run`.

    Raises: ValueError if `path` is not a directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"write_report: run_dirs must be folders written by `fastkd train`, got {path}; check the path"
        )
    run = Run(path, name or path.name, methods=methods or {})
    run.recipe = _read_json(run, "recipe.json", dict) or {}
    run.metrics = _read_json(run, "metrics.json", dict) or {}
    run.ledger = _read_json(run, "ledger.json", dict) or {}
    detections = _read_json(run, "detections.json", list)
    if detections is not None:
        run.detections, bad = to_results(detections)
        if bad:
            run.notes.append(f"detections.json has {bad} entries that are not COCO results; they are left out.")
    run.log = _read_log(run)
    return run


def load_runs(run_dirs, methods: Mapping[str, Any] | None = None) -> list[Run]:
    """Reads several run directories, gives them unique names, and marks the run that is the teacher of the others."""
    paths = [Path(path) for path in run_dirs]
    if not paths:
        raise ValueError(
            "write_report: run_dirs must name at least one run directory, got none; pass the folders that `fastkd "
            "train` wrote"
        )
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(track(paths, "read the runs", "runs"), names):
        if names.count(name) > 1:
            name = f"{path.resolve().parent.name}/{name}"
        runs.append(load_run(path, name, methods))
    teachers = {_folder_of(run.recipe.get("teacher")) for run in runs} - {None}
    for run in runs:
        run.is_teacher = run.path.resolve() in teachers or (
            run.method is None and not run.inherits and "teacher" in f"{run.recipe.get('name', '')} {run.name}".lower()
        )
        if run.is_teacher:
            run.notes = [line for line in run.notes if not line.startswith(NOT_OF_A_TEACHER)]
    return runs


def baseline_of(run: Run, runs: list[Run], inherits: bool = False) -> Run | None:
    """The undistilled run with the same detector and seed; with `inherits`, the one that inherits the teacher's head.

    Returns None for a teacher, for the baseline itself, and if there is no such run.
    """
    if run.is_teacher or (run.method is None and run.inherits == inherits):
        return None
    for other in runs:
        plain = other.method is None and not other.is_teacher and other.inherits == inherits
        if plain and other is not run and _comparable(other) == _comparable(run):
            return other
    return None


def difference_in_conditions(run: Run, other: Run) -> list[str]:
    """Names of the settings that differ although they must be equal for a comparison of AP."""
    names = []
    for key in ("data", "schedule", "optimizer", "backbone_weights"):
        if _settings(run.recipe.get(key)) != _settings(other.recipe.get(key)):
            names.append(key.replace("_", " "))
    if "schedule" not in names and run.metrics.get("steps") != other.metrics.get("steps"):
        names.append("steps")
    return names


def _settings(value):
    # the number of loader processes affects speed, never the batches
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if name not in ("workers", "val_batch_size")}


def _comparable(run: Run) -> tuple:
    return json.dumps(run.detector, sort_keys=True), run.recipe.get("seed", run.metrics.get("seed"))


def _folder_of(teacher) -> Path | None:
    """The run directory of a teacher's file; None without a teacher or for a shipped one."""
    if not isinstance(teacher, str) or not teacher or teacher.startswith(PREFIX):
        return None
    return Path(teacher).resolve().parent


def _read_json(run: Run, file_name: str, kind: type):
    file = run.path / file_name
    if not file.is_file():
        run.notes.append(f"{file_name} is missing.")
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{file_name} could not be read: {error}.")
        return None
    if not isinstance(value, kind):
        run.notes.append(
            f"{file_name} must hold a JSON {'object' if kind is dict else 'array'}, got {type(value).__name__}."
        )
        return None
    return value


def _read_log(run: Run) -> list[dict]:
    file = run.path / "log.jsonl"
    if not file.is_file():
        run.notes.append("log.jsonl is missing.")
        return []
    records, broken = read_json_lines(file)
    if broken:
        run.notes.append(f"log.jsonl has {broken} line(s) that are not JSON objects; they are left out.")
    return records
