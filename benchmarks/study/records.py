"""Finished runs of a study, one JSON object each in docs/results/<study>.json."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.rows import METRICS
from fastkd.assets import FOLDER
from fastkd.commands.train import parse
from fastkd.files import write_json_list

Record = dict[str, Any]  # run, seed, recipe (a digest), AP, steps, seconds, commit, command, costs, ...
COSTS = ("student_step", "method_step", "extra_bytes", "with_teacher")


@functools.cache
def digest(arguments: tuple[str, ...]) -> str:
    """Digest of the recipe that `fastkd train ARGUMENTS` trains, without its seed, and of the assets that it uses."""
    recipe, _ = parse(arguments[0], arguments[1:])
    content = recipe.to_dict()
    del content["seed"], content["runtime"]["ledger_pairs"]
    used = [str(value).removeprefix("asset:") for value in (recipe.teacher, recipe.backbone_weights)]
    sums = (FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    content["assets"] = [line for line in sums if line.split()[-1] in used]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read(path: Path) -> list[Record]:
    """The records of a file; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def add(path: Path, record: Record) -> None:
    """Writes a record to the file, in the place of one of the same run and seed."""
    key = (record["run"], record["seed"])
    others = [one for one in read(path) if (one["run"], one["seed"]) != key]
    write_json_list(path, sorted([*others, record], key=lambda one: (one["run"], one["seed"])))


def result_of(run_dir: Path) -> Record:
    """Metrics and costs of a finished run."""
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    scores = {key: metrics[kind][at] for key, (kind, at) in METRICS.items() if at in metrics.get(kind, {})}
    record = scores | {key: metrics[key] for key in ("steps", "batch_size", "seconds", "commit", "torch")}
    record["jumps"] = metrics["jumps"]["count"]
    if (run_dir / "ledger.json").is_file():
        ledger = json.loads((run_dir / "ledger.json").read_text(encoding="utf-8"))
        costs = (
            ledger["student"]["seconds_per_step"],
            ledger["with_method"]["seconds_per_step"],
            ledger["extra"]["peak_bytes"],
            ledger["extra_with_teacher"]["seconds_per_step"],
        )
        record |= dict(zip(COSTS, costs, strict=True))
    return record


def by_run(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, dict[int, Record]]:
    """run -> seed -> its record, for the wanted seeds."""
    found: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda one: one["seed"]):
        if record["seed"] in seeds:
            found.setdefault(record["run"], {})[record["seed"]] = record
    return found
