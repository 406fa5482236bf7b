"""Gains of distillation: `python -m benchmarks.study`, or `make study` (many hours, resumable).

Trains every row of a study (benchmarks/study/rows.py) with every seed, each in a process of one thread. Rows of one
detector and seed differ only in the method: same data, steps, batch order, initial backbone.

Stop the command and go on with it anywhere: a finished run is added to docs/results/<study>.json at once, and the page
and the plot beside it are made anew. A run that is recorded there with the same recipe is not made again; one with
another recipe does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.environment import KEEP_MEMORY, cpu_name
from benchmarks.study import records
from benchmarks.study.page import page, plot
from benchmarks.study.rows import STUDIES, arguments_of
from fastkd.files import write_text

Run = tuple[str, int]  # name, seed


@dataclasses.dataclass
class Campaign:
    """The runs of a study and their files.

    Args:
        name: of STUDIES.
        seeds: of every row.
        out: folder of the runs.
        results: folder of the results.
        options: arguments of `fastkd train` for all runs, beside the study's.
    """

    name: str
    seeds: list[int]
    out: Path
    results: Path
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.study, self.lock = STUDIES[self.name], threading.Lock()
        self.path = self.results / f"{self.name}.json"

    def arguments(self, run: str) -> tuple[str, ...]:
        """Arguments of `fastkd train`, without the seed."""
        return (*arguments_of(run), *self.study.options, *self.options)

    def valid(self) -> list[records.Record]:
        """The recorded runs whose recipe is that of the row."""
        return [one for one in records.read(self.path) if self.is_current(one)]

    def is_current(self, record: records.Record) -> bool:
        """Whether a recorded run has its row's recipe."""
        return record["run"] in self.study.runs and record["recipe"] == records.digest(self.arguments(record["run"]))

    def missing(self, names: list[str]) -> list[Run]:
        """The runs without a record, seed by seed."""
        made = {(one["run"], one["seed"]) for one in self.valid()}
        return [(name, seed) for seed in self.seeds for name in names if (name, seed) not in made]

    def make(self, run: Run) -> None:
        """Trains a run, records it and writes the page. Costs are measured with the first seed alone."""
        (name, seed), begin = run, time.monotonic()
        digest = records.digest(self.arguments(name))
        run_dir = self.out / f"{name.replace('@', '-')}-{digest}-seed{seed}"
        command = [*self.arguments(name), "--seed", str(seed)]
        if seed != self.seeds[0]:
            command += ["--runtime.ledger-pairs", "0"]
        self.train(run_dir, command)
        record = {"run": name, "seed": seed, "recipe": digest, **records.result_of(run_dir)}
        with self.lock:
            records.add(self.path, record | {"command": f"fastkd train {' '.join(command)}", "machine": cpu_name()})
            self.write()
        print(f"{name} seed {seed}: AP {record['AP']:.1f} in {time.monotonic() - begin:.0f} s", flush=True)

    def train(self, run_dir: Path, command: list[str]) -> None:
        """Trains, or goes on with, one run; its output is written to a file beside it."""
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        log_path = run_dir.with_name(f"{run_dir.name}.log")
        environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1"}
        with open(log_path, "a", encoding="utf-8") as log:
            arguments = [sys.executable, "-m", "fastkd.cli", "train", *command, "--run-dir", str(run_dir), "--resume"]
            code = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise SystemExit(f"study: {run_dir.name} ended with code {code}, see {log_path}; run again to resume")

    def write(self) -> None:
        """The page and the plot of the recorded runs."""
        found = self.valid()
        if not found:
            raise SystemExit(f"study: {self.path} must hold finished runs, got none of the present recipes")
        command = f"python -m benchmarks.study --study {self.name} --seeds {' '.join(map(str, self.seeds))}"
        text = page(self.name, self.study, found, self.seeds, " ".join([command, *self.options]))
        write_text(self.results / f"{self.name}.md", text)
        plot(self.study, records.by_run(found, self.seeds), self.results / f"{self.name}.png")


def main() -> None:
    """Train missing runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="scenes", help="which table (default: scenes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of every row (default: 0 .. 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the table")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="for a trial: steps of every run; needs --results")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[run for study in STUDIES.values() for run in study.runs],
        help="only these runs, in this order",
    )
    parser.add_argument("--only-write", action="store_true", help="train nothing, write the results of recorded runs")
    chosen = parser.parse_args()
    if chosen.steps and chosen.results == parser.get_default("results"):
        parser.error("argument --steps: needs --results FOLDER, as these runs are not the table's; add it")
    options = ("--schedule.steps", str(chosen.steps)) if chosen.steps else ()
    campaign = Campaign(chosen.study, chosen.seeds, chosen.out, chosen.results, options)
    if not chosen.only_write:
        for data in campaign.study.data:
            subprocess.run([sys.executable, "-m", "fastkd.cli", "data", *data], check=True)
        with ThreadPoolExecutor(chosen.jobs) as pool:
            missing = campaign.missing(chosen.rows or campaign.study.runs)
            for run in [pool.submit(campaign.make, run) for run in missing]:
                run.result()
    campaign.write()


if __name__ == "__main__":
    main()
