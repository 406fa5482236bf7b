"""The demo's table: gains, intervals over seeds, cost."""

from pathlib import Path

from fastkd.commands import demo as demo_module
from fastkd.report.runs import Run
from fastkd.training import get_recipe
from fastkd.training.methods import kinds


def a_run(name, ap, *, method=None, inherit=False, seed=0, seconds=60.0, ledger=None):
    """A run as `load_runs` gives it, with an AP."""
    recipe = get_recipe(f"scenes-retinanet-{method or ('inherit' if inherit else 'baseline')}").to_dict()
    metrics = {"bbox": {"AP": ap, "AP50": 50.0, "AP75": None}, "seconds": seconds}
    run = Run(Path(name), name, recipe | {"seed": seed}, metrics, ledger or {}, methods=kinds())
    run.is_teacher = name == "teacher"
    return run


def test_demo_table_shows_gain_and_cost(capsys):
    ledger = {
        "student": {"seconds_per_step": 0.2},
        "extra": {"seconds_per_step": 0.05, "ratio": 1.25, "ratio_interval": [1.1, 1.42], "peak_bytes": 3 * 2**20},
        "extra_with_teacher": {"seconds_per_step": 0.4},
    }
    runs = [
        a_run("teacher", 40.0, seconds=None),
        a_run("baseline", 25.0),
        a_run("icd", 28.5, method="icd", inherit=True, seconds=90.0, ledger=ledger),
    ]
    demo_module.show_table(runs)
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    for text in ("28.5", "+3.5", "1.5 min", "+25 % (+10 .. +42)", "+3 MiB", "+200%"):
        assert text in rows["icd"]
    assert "+" not in rows["baseline"] and "+" not in rows["teacher"]
    assert "train a student that only inherits" in said and "--seeds 3 adds confidence intervals" in said
    demo_module.show_table([*runs, a_run("inherit", 29.0, inherit=True)])
    said = " ".join(capsys.readouterr().out.split())
    assert "+4.0 of it by inheriting" in said and "-0.5 by ICD itself; one seed cannot tell" in said


def test_demo_table_over_seeds(capsys):
    """Means, and intervals by Student's t: 4.303 * s / sqrt(3) for three seeds."""
    runs = []
    for seed, (plain, kept, icd) in enumerate([(30.0, 36.0, 38.0), (31.0, 37.0, 38.5), (32.0, 38.0, 40.5)]):
        tail = f"-seed{seed}" if seed else ""
        runs += [
            a_run(f"baseline{tail}", plain, seed=seed),
            a_run(f"inherit{tail}", kept, inherit=True, seed=seed),
            a_run(f"icd{tail}", icd, method="icd", inherit=True, seed=seed),
        ]
    demo_module.show_table(runs)
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert list(rows) == ["baseline", "inherit", "icd"] and "31.0" in rows["baseline"]
    assert "+6.0 (+6.0 .. +6.0)" in rows["inherit"] and "+8.0 (+6.8 .. +9.2)" in rows["icd"]
    words = " ".join(said.split())
    assert "+6.0 of it by inheriting" in words and "+2.0 (+0.8 .. +3.2) by ICD itself." in words
