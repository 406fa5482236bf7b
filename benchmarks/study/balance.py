"""Sensitivity to a method's weight, with and without balancing (methods.md 10): `python -m benchmarks.study.balance`.

Trains two detectors with FGFI, its weight times 0.1, 1, 10 and 100, without balancing and with it, and each detector
alone. Resumable; writes docs/results/balance.md and .json after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console

from fastkd.data import generate_scenes
from fastkd.files import write_json
from fastkd.training import DistillConfig, FeatureMethod, Recipe, get_recipe, train

DETECTORS = {"retinanet": "RetinaNet", "fcos": "FCOS"}
FACTORS = (0.1, 1.0, 10.0, 100.0)
TEACHER = "asset:scenes-retinanet-teacher.safetensors"
Run = tuple[str, float | None, float | None]  # detector, factor on the weight (None: no method), ratio (None: off)


def all_runs(ratio: float) -> list[Run]:
    """Every run of one seed, controls first."""
    controls: list[Run] = [(detector, None, None) for detector in DETECTORS]
    grid = itertools.product(DETECTORS, FACTORS, (None, ratio))
    return controls + sorted(grid, key=lambda run: FACTORS.index(run[1]))


def run_name(run: Run, seed: int) -> str:
    """Name of the run directory."""
    detector, factor, ratio = run
    method = "baseline" if factor is None else f"x{factor:g}" + ("" if ratio is None else f"-balance{ratio:g}")
    return f"{detector}-{method}-seed{seed}"


def recipe_of(run: Run, seed: int, data: Path, steps: int, batch_size: int) -> Recipe:
    """The scenes recipe of a run, in float32."""
    detector, factor, ratio = run
    recipe = get_recipe(f"scenes-{detector}-{'baseline' if factor is None else 'fgfi'}")
    if factor is not None:
        assert isinstance(recipe.method, FeatureMethod)
        method = dataclasses.replace(recipe.method, weight=factor * recipe.method.weight)
        recipe = dataclasses.replace(recipe, method=method, teacher=TEACHER, distill=DistillConfig(balance=ratio))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, root=str(data), workers=0),
        schedule=dataclasses.replace(recipe.schedule, steps=steps, batch_size=batch_size),
        runtime=dataclasses.replace(recipe.runtime, precision="float32", log_every=10, ledger_pairs=0),
        seed=seed,
    )


def result_of(run_dir: Path, steps: int) -> dict[str, float | str | None]:
    """AP, the detector's loss over the last quarter of the run, the mean measured ratio, seconds a step."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["step"] > 0.75 * steps and "losses" in line]
    own = [sum(v for name, v in line["losses"].items() if not name.startswith("fgfi")) for line in last]
    ratios = [line["balance"]["ratio"] for line in lines if "balance" in line]
    return {
        "AP": metrics["bbox"]["AP"],
        "loss": statistics.mean(own),
        "ratio": statistics.mean(ratios) if ratios else None,
        "seconds": statistics.median(line["seconds_per_step"] for line in lines if "losses" in line),
        "commit": metrics["commit"],
    }


def page(found: dict[str, dict], chosen: argparse.Namespace) -> str:
    """The results in Markdown."""
    commits = sorted({(result["commit"] or "unknown")[:12] for result in found.values()})
    lines = [
        "# Balanced weights: sensitivity to the weight of a method",
        "",
        f"Command: `python -m benchmarks.study.balance --steps {chosen.steps} --batch-size {chosen.batch_size} --ratio "
        f"{chosen.ratio:g} --seeds {' '.join(map(str, chosen.seeds))}`; commit {', '.join(commits)}, torch",
        f"{torch.__version__}, float32, one thread. Scenes: {chosen.train_images} training and {chosen.val_images} "
        "validation images. FGFI, taught by the shipped RetinaNet teacher; its weight is the recipe's (2e-4) times",
        "the factor. `loss` is the detector's own over the last quarter of the run, `ratio` the mean of the logged",
        "ratios of the gradients at the pyramid. The runs are short: they show the sensitivity, not the method's gain.",
        "",
        "| detector | seed | weight | loss, as is | loss, balanced | AP, as is | AP, balanced | ratio | s/step, as is "
        "| s/step, balanced |",
        "|" + "---|" * 10,
    ]
    for detector, seed, factor in itertools.product(DETECTORS, chosen.seeds, (None, *FACTORS)):
        pair = [found.get(run_name((detector, factor, ratio), seed)) for ratio in (None, chosen.ratio)]
        plain, balanced = pair if factor is not None else (pair[0], None)
        if plain is None and balanced is None:
            continue
        cells = [DETECTORS[detector], str(seed), "no method" if factor is None else f"x {factor:g}"]
        for key, form in (("loss", ".3f"), ("AP", ".1f")):
            cells += ["-" if one is None else format(one[key], form) for one in (plain, balanced)]
        cells += ["-" if balanced is None or balanced["ratio"] is None else f"{balanced['ratio']:.2f}"]
        cells += ["-" if one is None else f"{one['seconds']:.3f}" for one in (plain, balanced)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Train missing runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--val-images", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/balance"), help="folder of data and runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = chosen.out / "scenes"
    generate_scenes(data, train=chosen.train_images, val=chosen.val_images, processes=1)
    found: dict[str, dict] = {}
    for seed, run in itertools.product(chosen.seeds, all_runs(chosen.ratio)):
        run_dir = chosen.out / run_name(run, seed)
        recipe = recipe_of(run, seed, data, chosen.steps, chosen.batch_size)
        train(recipe, run_dir, resume=True, device="cpu", console=Console(file=io.StringIO()))
        found[run_dir.name] = result_of(run_dir, chosen.steps)
        print(run_dir.name, found[run_dir.name], flush=True)
        chosen.results.mkdir(parents=True, exist_ok=True)
        (chosen.results / "balance.md").write_text(page(found, chosen), encoding="utf-8")
        write_json(chosen.results / "balance.json", found)


if __name__ == "__main__":
    main()
