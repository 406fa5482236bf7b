"""`fastkd demo`: trains the same small detector with and without distillation and compares them, in 15 minutes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.commands.common import device_argument, say
from fastkd.commands.data import CROWD_TRAIN, CROWD_VAL, TRAIN_IMAGES, VAL_IMAGES, write_crowd, write_scenes
from fastkd.files import write_json, write_json_list
from fastkd.signals import Interrupted

if TYPE_CHECKING:
    from fastkd.report.runs import Run

METHODS = ("baseline", "lgd", "fgfi", "inherit", "icd")  # inherit is the control of icd, whose student inherits too
CROWD_METHODS = ("baseline", "lgd")
REPORT_IMAGES = 6
QUICK_STEPS, QUICK_TRAIN, QUICK_VAL = 50, 800, 60
TABLE_WIDTH = 124  # so that no cell is broken if the output is not a terminal
QUICK_PAIRS = 6  # of steps for the cost ledger; fewer give no interval


@dataclass(frozen=True)
class Size:
    """How much the demo trains. Args: steps: of each run, None as in the recipes; train, val: images to generate."""

    steps: int | None
    train: int
    val: int
    quick: bool = False


def demo(
    out: Path | None = None,
    data: Path | None = None,
    crowd: bool = False,
    quick: bool = False,
    seed: int = 0,
    seeds: int = 1,
    steps: int | None = None,
    images: int | None = None,
    val_images: int | None = None,
    teacher: Path | None = None,
    device: str = "auto",
) -> None:
    """Demonstrate distillation: train a small detector alone, with LGD, FGFI and ICD, and write a report.

    The runs differ only in the method: data, steps, seed and initial weights are equal. ICD's student starts from the
    teacher's neck and head; beside it stands a student that only does that, so that the two parts of the gain can be
    told apart. Takes about 15 minutes on two CPU cores, with --quick under four. Interrupted? Run the same command
    again; it continues where it stopped.

    Args:
        out: Folder for the runs and report.html. Default: runs/demo, with --quick runs/demo-quick.
        data: Folder of the generated data set; generated if missing. Default: data/scenes or data/crowd.
        crowd: Use crowds of people instead of shapes: Faster R-CNN alone and with LGD, measured by MR^-2, AP and JI.
        quick: The same page from far fewer steps and images: its figures mean little.
        seed: Seed of all runs; with --seeds the first.
        seeds: Repeat every run with as many seeds; from two on, gains come with 95 % confidence intervals.
        steps: Steps of each run. Default: as in the recipes.
        images: Training images to generate. Default: 8000, with --crowd 4000.
        val_images: Validation images to generate. Default: 500, with --crowd 400.
        teacher: Teacher to use instead of the shipped one.
        device: auto, cpu, cuda or cuda:N.
    """
    where = device_argument(device)
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    if crowd and teacher is not None:
        raise ValueError("--crowd must stand without --teacher: its methods have no teacher")
    suffix = ("-crowd" if crowd else "") + ("-quick" if quick else "")
    out = out or Path(f"runs/demo{suffix}")
    data = data or Path(f"data/{'crowd' if crowd else 'scenes'}{'-quick' if quick else ''}")
    size = demo_size(crowd=crowd, quick=quick, steps=steps, train=images, val=val_images)
    options: dict[str, Any] = {"data": data, "size": size, "precision": precision(where)}
    recipes: dict[str, Any] = {}
    for number in range(seed, seed + seeds):
        one = (
            crowd_demo_recipes(seed=number, **options)
            if crowd
            else demo_recipes(seed=number, teacher=teacher, **options)
        )
        recipes |= {name if number == seed else f"{name}-seed{number}": recipe for name, recipe in one.items()}
    (write_crowd if crowd else write_scenes)(data, train=size.train, val=size.val)
    before: list[Path] = []
    if not crowd:
        teacher_file = Path(next(recipe.teacher for recipe in recipes.values() if recipe.teacher))
        evaluate_teacher(teacher_file, next(iter(recipes.values())), out / "teacher", where)
        before = [out / "teacher"]
    run_all(recipes, before, out, where, quick=quick)


def demo_size(*, crowd: bool, quick: bool, steps: int | None, train: int | None, val: int | None) -> Size:
    """The demo's steps and images; what is None gets its default."""
    images, val_images = (CROWD_TRAIN, CROWD_VAL) if crowd else (TRAIN_IMAGES, VAL_IMAGES)
    if quick:
        steps, images, val_images = steps or QUICK_STEPS, QUICK_TRAIN, QUICK_VAL
    return Size(steps, train or images, val or val_images, quick)


def precision(device) -> str:
    """The faster precision of the device; None is a GPU if there is one."""
    import torch

    from fastkd.training.precision import fast_precision

    return fast_precision(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))


def run_all(recipes: dict[str, Any], before: Sequence[Path], out: Path, where, *, quick: bool = False) -> None:
    """Train each recipe into its folder; print the table of results and write the report.

    Args:
        recipes: recipes by name of their folder.
        before: run directories to show first (the teacher's).
        out: folder for the runs and report.html.
        where: device, or None.
        quick: whether to say that the figures mean little.
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

    from fastkd.report import write_report
    from fastkd.report.runs import load_runs
    from fastkd.training.methods import kinds

    steps = next(iter(recipes.values())).schedule.steps
    notice = f"A quick demo: runs of {steps} steps on few images. It shows the page; its figures mean little."
    folders = [*before, *(out / name for name in recipes)]
    show_table(load_runs(folders, kinds()))
    if quick:
        say(f"{notice} `fastkd demo` without --quick takes a quarter of an hour.")
    page = write_report(
        folders, out / "report.html", images=REPORT_IMAGES, title="fastkd demo", methods=kinds(),
        notice=notice if quick else None,
    )  # fmt: skip
    say(f"\nreport: {page.resolve()}\nopen it in a browser: curves, costs, what the networks see, their mistakes")


def demo_recipes(*, data: Path, size: Size, precision: str, seed: int, teacher: Path | None) -> dict[str, Any]:
    """The demo's recipes by short name, which differ only in the method; verifies the files they need."""
    from fastkd.assets import resolve
    from fastkd.training import get_recipe

    recipes = {}
    for method in METHODS:
        recipe = _sized(get_recipe(f"scenes-retinanet-{method}"), data, size, precision, seed)
        recipes[method] = dataclasses.replace(
            recipe,
            teacher=str(teacher or resolve(recipe.teacher)) if recipe.teacher else None,
            backbone_weights=str(resolve(recipe.backbone_weights)) if recipe.backbone_weights else None,
        )
    return recipes


def crowd_demo_recipes(*, data: Path, size: Size, precision: str, seed: int) -> dict[str, Any]:
    """The crowd demo's recipes by short name, which differ only in the method."""
    from fastkd.training import get_recipe

    return {
        method: _sized(get_recipe(f"crowd-faster-rcnn-{method}"), data, size, precision, seed)
        for method in CROWD_METHODS
    }


def _sized(recipe, data: Path, size: Size, precision: str, seed: int):
    """A recipe with the demo's data, seed, number of steps and precision."""
    pairs = min(recipe.runtime.ledger_pairs, QUICK_PAIRS) if size.quick else recipe.runtime.ledger_pairs
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, root=str(data)),
        schedule=dataclasses.replace(recipe.schedule, steps=size.steps or recipe.schedule.steps),
        runtime=dataclasses.replace(recipe.runtime, precision=precision, ledger_pairs=pairs),
        seed=seed,
    )


def evaluate_teacher(weights: Path, recipe, folder: Path, device) -> None:
    """Measure the teacher on the validation images, once, into a folder that the report can read like a run's."""
    from fastkd.training.run.checkpoint import sha256_of

    if not weights.is_file():
        raise ValueError(f"--teacher must be an existing file, got {weights}")
    digest, done = sha256_of(weights), folder / "metrics.json"
    conditions = {"sha256": digest, "data": str(recipe.data.root)}
    if done.is_file():
        metrics = json.loads(done.read_text(encoding="utf-8"))
        if metrics.get("conditions") == conditions:
            return
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
    write_json_list(folder / "detections.json", evaluator.iterate_results())
    write_json(done, metrics)


def show_table(runs: list[Run]) -> None:
    """Print AP, gain over the baseline, time and extra cost, and what to make of the gains; seeds are averaged."""
    from rich.console import Console
    from rich.table import Table

    from fastkd.report.seeds import attribution, gain_of, groups, when_it_pays

    several = any(len(members) > 1 for members in groups(runs).values())
    kind = "means over the seeds, with 95 % intervals" if several else "same data, steps and seed"
    table = Table(title=f"\nThe demo's runs: {kind}", title_justify="left", header_style="bold")
    table.add_column("run", no_wrap=True)
    crowd = any(run.score("bbox", "MR") is not None for run in runs)
    details = {"MR^-2": "MR", "JI": "JI"} if crowd else {"AP50": "AP50", "AP75": "AP75"}
    for column in ("AP", "gain", *details, "time", "extra time (95 %)", "extra memory", "with teacher"):
        table.add_column(column, justify="right")
    for name, members in groups(runs).items():
        gain = gain_of(members, runs)
        table.add_row(
            name,
            _mean(members, "AP"),
            "-" if gain is None else gain.signed,
            *(_mean(members, key) for key in details.values()),
            _minutes(members[0]),
            *_extra(members[0]),
        )
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    seeds = "" if several else " One seed is one draw; --seeds 3 adds confidence intervals."
    for line in (
        f"gain: AP over the baseline.{seeds}",
        *(f"{line}." for line in attribution(runs)),
        *when_it_pays(runs),
    ):
        print(line)


def _mean(members: list[Run], key: str) -> str:
    values = [value for run in members if (value := run.score("bbox", key)) is not None]
    return f"{sum(values) / len(values):.1f}" if values else "-"


def _minutes(run: Run) -> str:
    seconds = run.metrics.get("seconds")
    return "-" if seconds is None else f"{seconds / 60:.1f} min"


def _extra(run: Run) -> list[str]:
    """A method's extra cost: relative step time with its interval, memory, time with the teacher's training."""
    from fastkd.report.cost import entry, interval, share

    alone, memory = entry(run, "student", "seconds_per_step"), entry(run, "extra", "peak_bytes")
    if run.method is None or alone is None or memory is None:
        return ["-"] * 3
    whole, steps = entry(run, "extra_with_teacher", "seconds_per_step"), entry(run, "run", "steps")
    shown = "unknown" if whole is None else f"{whole / alone:+.0%}"
    ends = interval(run, "extra_with_teacher", "interval")
    if whole is not None and ends is not None and steps:
        shown += f" ({' .. '.join(f'{end / steps / alone:+.0%}' for end in ends)})"
    return [share(run), f"{memory / 2**20:+,.0f} MiB", shown]
