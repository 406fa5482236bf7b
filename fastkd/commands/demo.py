"""`fastkd demo`: trains the same small detector with and without distillation and compares them, in 15 minutes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.commands.common import device_argument, say
from fastkd.commands.data import CROWD_TRAIN, CROWD_VAL, TRAIN_IMAGES, VAL_IMAGES, write_crowd, write_scenes
from fastkd.files import write_json
from fastkd.signals import Interrupted

METHODS = ("baseline", "lgd", "icd", "fgfi")
CROWD_METHODS = ("baseline", "lgd")
CONTROL = "inherit"
REPORT_IMAGES = 6


def demo(
    out: Path = Path("runs/demo"),
    data: Path | None = None,
    crowd: bool = False,
    seed: int = 0,
    steps: int | None = None,
    control: bool = False,
    images: int | None = None,
    val_images: int | None = None,
    teacher: Path | None = None,
    device: str = "auto",
) -> None:
    """Demonstrate distillation: train a small detector alone, with LGD, with ICD and with FGFI, and write a report.

    The runs differ only in the method: data, steps, seed and initial weights are equal. Takes about 15 minutes on two
    CPU cores. Interrupted? Run the same command again; it continues where it stopped.

    Args:
        out: Folder for the runs and report.html.
        data: Folder of the generated data set; generated if missing. Default: data/scenes or data/crowd.
        crowd: Use crowds of people instead of shapes: Faster R-CNN alone and with LGD, measured by MR^-2, AP and JI.
        seed: Seed of all runs.
        steps: Steps of each run. Default: as in the recipes.
        control: Also train a student that only inherits the teacher's head, the fair comparison for ICD.
        images: Training images to generate. Default: 8000, with --crowd 4000.
        val_images: Validation images to generate. Default: 500, with --crowd 400.
        teacher: Teacher to use instead of the shipped one.
        device: auto, cpu, cuda or cuda:N.
    """
    where = device_argument(device)
    if crowd:
        if control or teacher is not None:
            raise ValueError("--crowd must stand without --control and --teacher: its methods have no teacher")
        data = data or Path("data/crowd")
        recipes = crowd_demo_recipes(data=data, seed=seed, steps=steps)
        write_crowd(data, train=images or CROWD_TRAIN, val=val_images or CROWD_VAL)
        metrics = {}
    else:
        data = data or Path("data/scenes")
        recipes = demo_recipes(data=data, seed=seed, steps=steps, control=control, teacher=teacher)
        write_scenes(data, train=images or TRAIN_IMAGES, val=val_images or VAL_IMAGES)
        teacher_file = Path(next(recipe.teacher for recipe in recipes.values() if recipe.teacher))
        metrics = {"teacher": evaluate_teacher(teacher_file, next(iter(recipes.values())), out / "teacher", where)}
    run_all(recipes, metrics, out, where)


def run_all(recipes: dict[str, Any], metrics: dict[str, dict], out: Path, where) -> None:
    """Train each recipe into its folder; print the table of results and write the report.

    Args:
        recipes: recipes by short name.
        metrics: metrics measured before (of the teacher); those of the runs are added.
        out: folder for the runs and report.html.
        where: device, or None.
    """
    from fastkd.training import train
    from fastkd.training.run.directory import RunDirectoryError

    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        say(f"\n[{number}/{len(recipes)}] {name}: {recipe.schedule.steps} steps into {out / name}")
        try:
            result = train(recipe, out / name, resume=True, device=where)
        except RunDirectoryError as error:
            raise ValueError(
                f"demo: {out / name} holds a run with other settings; choose another --out ({error})"
            ) from error
        if result.exit_code:
            raise Interrupted.with_exit_code(result.exit_code)
        metrics[name] = result.metrics
    inheriting = [name for name, recipe in recipes.items() if recipe.inherit and recipe.method is not None]
    show_table(metrics, {name: read_ledger(out / name) for name in recipes}, inheriting)

    from fastkd.report import write_report
    from fastkd.training.methods import kinds

    runs = [out / name for name in metrics]
    page = write_report(runs, out / "report.html", images=REPORT_IMAGES, title="fastkd demo", methods=kinds())
    say(f"\nreport: {page.resolve()}\nopen it in a browser: curves, costs, what the networks see, their mistakes")


def demo_recipes(*, data: Path, seed: int, steps: int | None, control: bool, teacher: Path | None) -> dict[str, Any]:
    """The demo's recipes by short name, which differ only in the method; verifies the files they need."""
    from fastkd.assets import resolve
    from fastkd.training import get_recipe

    recipes = {}
    for method in (*METHODS, CONTROL) if control else METHODS:
        recipe = get_recipe(f"scenes-retinanet-{method}")
        schedule = recipe.schedule if steps is None else dataclasses.replace(recipe.schedule, steps=steps)
        recipes[method] = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, root=str(data)),
            schedule=schedule,
            seed=seed,
            teacher=str(teacher or resolve(recipe.teacher)) if recipe.teacher else None,
            backbone_weights=str(resolve(recipe.backbone_weights)) if recipe.backbone_weights else None,
        )
    return recipes


def crowd_demo_recipes(*, data: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """The crowd demo's recipes by short name, which differ only in the method."""
    from fastkd.training import get_recipe

    recipes = {}
    for method in CROWD_METHODS:
        recipe = get_recipe(f"crowd-faster-rcnn-{method}")
        schedule = recipe.schedule if steps is None else dataclasses.replace(recipe.schedule, steps=steps)
        place = dataclasses.replace(recipe.data, root=str(data))
        recipes[method] = dataclasses.replace(recipe, data=place, schedule=schedule, seed=seed)
    return recipes


def evaluate_teacher(weights: Path, recipe, folder: Path, device) -> dict[str, Any]:
    """Measure the teacher on the validation images, once, into a folder that the report can read like a run's."""
    from fastkd.training.run.checkpoint import sha256_of

    if not weights.is_file():
        raise ValueError(f"--teacher must be an existing file, got {weights}")
    digest, done = sha256_of(weights), folder / "metrics.json"
    conditions = {"sha256": digest, "data": str(recipe.data.root)}
    if done.is_file():
        metrics = json.loads(done.read_text(encoding="utf-8"))
        if metrics.get("conditions") == conditions:
            return metrics
    say(f"teacher: {weights}")

    from fastkd.data import CocoDataset, build_eval_loader
    from fastkd.detectors import load_detector, save_detector
    from fastkd.evaluation import CocoEvaluator, evaluate, print_metrics
    from fastkd.training.cost.ledger import teacher_cost

    data, root = recipe.data, Path(recipe.data.root)
    dataset = CocoDataset(root / data.val_annotations, root / data.val_images)
    detector, class_names = load_detector(weights)
    if list(class_names) != dataset.class_names:
        raise ValueError(f"--teacher must know the classes of {data.root}, got {list(class_names)} in {weights}")
    loader = build_eval_loader(
        dataset,
        batch_size=data.val_batch_size,
        workers=data.workers,
        short_side=data.val_short_side,
        max_side=data.max_side,
        divisor=data.divisor,
    )
    evaluator = CocoEvaluator(dataset)
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    measured = evaluate(detector.to(device), loader, evaluator, device=device)
    print_metrics(measured)
    cost = teacher_cost(str(weights))
    metrics = {"name": "teacher", "finished": True, "conditions": conditions, **measured}
    metrics |= {"steps": cost["steps"], "seconds": cost["seconds"]}
    metrics["parameters"] = sum(p.numel() for p in detector.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    save_detector(detector, folder / "student.safetensors", class_names)
    plain = dataclasses.replace(
        recipe, name="scenes-retinanet-teacher", detector=detector.config, method=None, teacher=None, inherit=False
    )
    write_json(folder / "recipe.json", plain.to_dict())
    write_json(folder / "detections.json", evaluator.results())
    write_json(done, metrics)
    return metrics


def read_ledger(run_dir: Path) -> dict[str, Any] | None:
    """ledger.json of a run; None if there is none."""
    path = run_dir / "ledger.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def show_table(metrics: dict[str, dict], ledgers: dict[str, dict | None], inheriting: Sequence[str] = ()) -> None:
    """Print AP, gain over the baseline, time and extra cost of every run, with a note on how to read the gains.

    Args:
        inheriting: names of the runs whose method inherits the teacher's neck and head.
    """
    from rich.console import Console
    from rich.table import Table

    from fastkd.evaluation.tables import number

    table = Table(title="\nThe demo's runs: same data, steps and seed", title_justify="left", header_style="bold")
    table.add_column("run", no_wrap=True)
    crowd = "MR" in metrics["baseline"]["bbox"]
    details = {"MR^-2": "MR", "JI": "JI"} if crowd else {"AP50": "AP50", "AP75": "AP75"}
    for column in ("AP", "gain", *details, "time", "extra time", "extra memory", "with teacher"):
        table.add_column(column, justify="right")
    base = metrics["baseline"]["bbox"]["AP"]
    for name, values in metrics.items():
        box, ledger = values["bbox"], ledgers.get(name)
        compared = name not in ("teacher", "baseline") and None not in (box["AP"], base)
        table.add_row(
            name,
            number(box["AP"]),
            f"{box['AP'] - base:+.1f}" if compared else "-",
            *(number(box[key]) for key in details.values()),
            _minutes(values.get("seconds")),
            *_extra(ledger),
        )
    Console().print(table)
    for line in _explain_gains(metrics, inheriting):
        print(line)


def _explain_gains(metrics: dict[str, dict], inheriting: Sequence[str]) -> list[str]:
    """A note on the gains: one seed is one sample, and part of an inheriting method's gain comes from inheriting."""
    lines = ["gain: AP over the baseline. One seed is one draw: the baseline's own AP moves by several points."]
    control = metrics.get(CONTROL, {}).get("bbox", {}).get("AP")
    for name in inheriting:
        score = metrics.get(name, {}).get("bbox", {}).get("AP")
        if None not in (score, control):
            rest = f", as {CONTROL} does; over that it gains {score - control:+.1f}."
        elif score is not None:
            rest = "; --control also trains what that alone gives."
        else:
            continue
        lines.append(f"{name} starts from the teacher's neck and head{rest}")
    return lines


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.1f} min"


def _extra(ledger: dict | None) -> list[str]:
    """A method's extra cost: relative step time, memory, and time including the teacher's training."""
    if ledger is None or ledger.get("method") is None:
        return ["-"] * 3
    alone, extra = ledger["student"]["seconds_per_step"], ledger["extra"]
    whole = ledger["extra_with_teacher"]["seconds_per_step"]
    return [
        f"{extra['seconds_per_step'] / alone:+.0%}",
        f"{extra['peak_bytes'] / 2**20:+,.0f} MiB",
        "unknown" if whole is None else f"{whole / alone:+.0%}",
    ]
