"""Effect of distillation in other training frameworks: `python -m benchmarks.hosts` (hours, resumable).

Scenes in each host's data format, the host's training entry point, a larger teacher trained in the host, and three
seeds each of: the host alone, with ICD, with LGD, and with Ultralytics' built-in distillation. Equal numbers of steps;
AP by pycocotools from the host's predictions; memory; seconds per step, also with the reference backend.

Stop the command and go on with it anywhere: every finished run is added to docs/results/hosts.json at once, and
docs/results/hosts.md is written anew. A run that is recorded there with the same settings is not made again. Weights
and data lie in --out; a teacher, or a pretrained student, is trained again only if a missing run needs it and its file
is gone. Try the command with --steps 4 --train 32 --val 8 --seeds 0 --results build/trial.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import KEEP_MEMORY
from benchmarks.hosts import records
from benchmarks.hosts.measure import measure
from benchmarks.hosts.page import page
from benchmarks.hosts.plan import HOSTS, TEACHER_SEED, Run, Trial, all_runs, settings, teacher_of
from fastkd.files import write_json, write_text

RESULTS = Path("docs/results")


@dataclasses.dataclass
class Campaign:
    """The runs of the table, their records and their files.

    Args:
        hosts: whose runs are made; the table also has the other recorded ones.
        seeds: of the table.
        trial: sizes of a trial.
        device: "cpu" or "cuda".
        out: folder of data and weights.
        results: folder of hosts.json and hosts.md.
    """

    hosts: list[str]
    seeds: list[int]
    trial: Trial
    device: str
    out: Path
    results: Path

    def missing(self) -> list[Run]:
        """The runs without a record."""
        known = records.read(self.results / "hosts.json")
        runs = all_runs(self.hosts, self.seeds)
        return [run for run in runs if records.find(known, run, settings(run, self.trial, self.device)) is None]

    def make(self, run: Run) -> None:
        """Makes a run, first the teacher and the student that it needs if their files are gone; records them all."""
        needed = [teacher_of(run.host)] if run.needs_teacher else []
        needed += [Run(run.host, "start", TEACHER_SEED)] if run.needs_start else []
        for other in needed:
            if not self.is_kept(other):
                self.execute(other)
            self.record(other)
        self.execute(run)
        self.record(run)

    def record(self, run: Run) -> None:
        """Adds the result of a run to hosts.json and writes the page."""
        records.add(self.results / "hosts.json", self.result_of(run))
        self.write_page()

    def write_page(self) -> None:
        """Writes hosts.md from the records, also those of other hosts."""
        path = self.results / "hosts.json"
        with records.locked(path):
            known = records.read(path)
            begun = {record["host"] for record in known if record["method"] not in ("teacher", "start")}
            hosts = [host for host in HOSTS if host in begun | set(self.hosts)]
            write_text(self.results / "hosts.md", page(known, hosts, self.seeds, self.trial, self.device))

    def is_kept(self, run: Run) -> bool:
        """Whether the files of a run are there, made with its settings."""
        folder = self.out / run.name
        if not (folder / "result.json").is_file() or not (folder / "model.pt").exists():
            return False
        return self.result_of(run)["settings"] == settings(run, self.trial, self.device)

    def result_of(self, run: Run) -> records.Record:
        """The result that a run wrote to its folder."""
        return json.loads((self.out / run.name / "result.json").read_text(encoding="utf-8"))

    def execute(self, run: Run) -> None:
        """A run in a process of one thread; its output is written to log.txt in its folder."""
        folder = self.out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.hosts", "--one", run.host, run.method, run.seed]
        command += ["--out", self.out, "--device", self.device]
        for name, value in dataclasses.asdict(self.trial).items():
            command += [] if value is None else [f"--{name}", value]
        environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1"}
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            done = subprocess.run([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise SystemExit(f"hosts: {run.name} ended with code {done.returncode}, see {folder / 'log.txt'}")


def main() -> None:
    """Makes the missing runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=HOSTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="for a trial: steps of every run")
    parser.add_argument("--train", type=int, help="for a trial: training images")
    parser.add_argument("--val", type=int, help="for a trial: validation images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/hosts"), help="folder of data and weights")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of hosts.json and hosts.md")
    parser.add_argument("--only-write", action="store_true", help="make no run, write the page")
    parser.add_argument("--one", nargs=3, metavar=("HOST", "METHOD", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    trial = Trial(given.steps, given.train, given.val)
    if given.one:
        run = Run(given.one[0], given.one[1], int(given.one[2]))
        write_json(given.out / run.name / "result.json", measure(run, trial, given.device, given.out))
        return
    if trial and given.results == RESULTS:
        parser.error("argument --steps, --train, --val: need --results FOLDER, as they are not the table's; add it")
    campaign = Campaign(given.hosts, given.seeds, trial, given.device, given.out, given.results)
    for run in [] if given.only_write else campaign.missing():
        print(run.name, flush=True)
        campaign.make(run)
    campaign.write_page()


if __name__ == "__main__":
    main()
