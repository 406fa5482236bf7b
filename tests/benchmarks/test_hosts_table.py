"""The table of hosts: recorded runs are not made again, teachers only if needed, and the page names missing runs."""

import dataclasses
import json
import multiprocessing

import pytest

from benchmarks.hosts import records
from benchmarks.hosts.__main__ import Campaign, main
from benchmarks.hosts.plan import Run, Trial, all_runs, settings

TEACHER = Run("ultralytics", "teacher", 0)


def result_of(run, trial, ap=10.0):
    found = {"AP": ap, "AP50": 2 * ap, "seconds": 1.0, "mebibytes": 500.0}
    if run.method in ("cost", "full"):
        found = {
            "seconds": {"alone": 1.0, "icd": 1.5, "icd reference": 3.0, "lgd": 2.0, "lgd reference": 4.0, "own": 1.2}
        }
    if run.needs_teacher:
        found["teacher_AP"] = 20.0
    origin = {"commit": "abc", "torch": "2", "package": f"{run.host} 1", "machine": "a CPU"}
    return {**dataclasses.asdict(run), "settings": settings(run, trial, "cpu"), **found, **origin}


class Recorded(Campaign):
    """A campaign whose runs are not trained; `made` holds their names, `ap` the AP of a method."""

    def execute(self, run):
        self.made = [*getattr(self, "made", []), run.name]
        folder = self.out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.pt").touch()
        ap = {"icd": 12.0 + run.seed, "lgd": 9.5}.get(run.method, 10.0)
        (folder / "result.json").write_text(json.dumps(result_of(run, self.trial, ap)))


@pytest.fixture
def campaign(tmp_path):
    def make(out="machine", trial=Trial(), hosts=("ultralytics",), seeds=(0, 1)):  # noqa: B008
        return Recorded(list(hosts), list(seeds), trial, "cpu", tmp_path / out, tmp_path / "results")

    return make


def make_all(campaign):
    campaign.made = []
    for run in campaign.missing():
        campaign.make(run)
    return campaign.made


def test_a_recorded_run_is_not_made_again(campaign):
    made = make_all(campaign())
    assert made[:4] == [
        "ultralytics-start-seed0", "ultralytics-alone-seed0", "ultralytics-teacher-seed0", "ultralytics-icd-seed0",
    ]  # fmt: skip
    assert len(made) == len(set(made)) == 2 + 2 * 4 + 2
    assert make_all(campaign()) == [] and make_all(campaign("another machine")) == []
    assert make_all(campaign("another machine", hosts=["ultralytics", "lightning"], seeds=[0])) == [
        "lightning-alone-seed0", "lightning-teacher-seed0", "lightning-icd-seed0", "lightning-lgd-seed0",
        "lightning-cost-seed0",
    ]  # fmt: skip


def test_a_stopped_campaign_goes_on_on_another_machine(campaign, tmp_path):
    first = campaign()
    for run in first.missing()[:2]:
        first.make(run)
    text = (tmp_path / "results" / "hosts.md").read_text()
    assert "2 of 10 runs are made. Missing: ultralytics lgd (seeds 0, 1), ultralytics own (seeds 0, 1), " in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "| icd | 12.0, missing | +2.0, missing | +2.0 | missing | missing | missing | 500 |" in text
    later = make_all(campaign("another machine"))
    assert later[:4] == [
        "ultralytics-start-seed0", "ultralytics-lgd-seed0", "ultralytics-teacher-seed0", "ultralytics-own-seed0",
    ]  # fmt: skip
    text = (tmp_path / "results" / "hosts.md").read_text()
    assert "10 of 10 runs are made.\n" in text
    assert "| icd | 12.0, 13.0 | +2.0, +3.0 | +2.5 (-3.9 .. +8.9) | 1.500 | 1.50 | 3.000 | 500 |" in text
    assert str(tmp_path) not in text + (tmp_path / "results" / "hosts.json").read_text()


def test_other_settings_are_other_runs(campaign):
    make_all(campaign(trial=Trial(steps=4)))
    assert len(make_all(campaign(trial=Trial(steps=5)))) == 11  # the teacher's file has other settings, too
    assert make_all(campaign(trial=Trial(steps=5))) == []


def test_a_teachers_settings_count_for_those_whom_it_teaches():
    icd, lgd = (settings(Run("torchvision", method, 0), Trial(), "cpu") for method in ("icd", "lgd"))
    assert "teacher_steps" in icd and "teacher_steps" not in lgd
    assert [run.method for run in all_runs(["torchvision"], [3])] == ["alone", "icd", "lgd", "cost", "full"]
    assert "full" not in [run.method for run in all_runs(["lightning"], [3])]


def test_a_pretrained_student_belongs_to_the_settings_of_those_who_begin_with_it():
    start, alone, cost = (settings(Run("transformers", name, 0), Trial(), "cpu") for name in ("start", "alone", "cost"))
    assert start["start_steps"] == alone["start_steps"] and "start_steps" not in cost and "steps" not in start
    assert "start_steps" not in settings(Run("torchvision", "alone", 0), Trial(), "cpu")


def test_transformers_has_torchvisions_teacher(campaign):
    made = make_all(campaign(hosts=["transformers"], seeds=[0]))
    assert made[:4] == [
        "transformers-start-seed0", "transformers-alone-seed0", "torchvision-teacher-seed0", "transformers-icd-seed0",
    ]  # fmt: skip


def test_a_trial_does_not_write_into_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hosts", "--steps", "4"])
    with pytest.raises(SystemExit):
        main()
    assert "need --results FOLDER" in capsys.readouterr().err


def test_a_failed_run_is_named(campaign, monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    failing = campaign()
    with pytest.raises(SystemExit, match=r"ultralytics-teacher-seed0 ended with code 1, see .*log.txt"):
        Campaign.execute(failing, TEACHER)


def _add_records(path, host, start):
    start.wait(60)
    for seed in range(40):
        records.add(path, result_of(Run(host, "alone", seed), Trial()))


def test_two_campaigns_at_once_lose_no_record(tmp_path):
    context = multiprocessing.get_context("fork")
    start, path = context.Barrier(2), tmp_path / "hosts.json"
    hosts = ("torchvision", "lightning")
    campaigns = [context.Process(target=_add_records, args=(path, host, start)) for host in hosts]
    for process in campaigns:
        process.start()
    for process in campaigns:
        process.join(60)
    found = [(record["host"], record["seed"]) for record in records.read(path)]
    assert found == [(host, seed) for host in sorted(hosts) for seed in range(40)]
    assert [file.name for file in tmp_path.iterdir()] == ["hosts.json"]


def test_the_page_keeps_the_hosts_of_other_campaigns(campaign, tmp_path):
    make_all(campaign(hosts=["ultralytics"], seeds=[0]))
    make_all(campaign(hosts=["transformers"], seeds=[0]))
    text = (tmp_path / "results" / "hosts.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## transformers", "## ultralytics", "## A step at full size",
    ]  # fmt: skip
    assert "11 of 11 runs are made" in text and "no run is made" not in text.lower()
