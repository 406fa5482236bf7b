"""`fastkd train` and `fastkd recipes`.

`train` is parsed in two steps, because its options are the fields of the chosen recipe: first the recipe's name, then
the other arguments with that recipe as the default.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastkd.commands.common import device_argument, say, take_detectors
from fastkd.signals import Interrupted

log = logging.getLogger("fastkd.commands")
TABLE_WIDTH = 130  # so that names are not truncated if the output is not a terminal

USAGE = """usage: fastkd train RECIPE [--run-dir DIR] [--resume] [--device DEVICE] [--detector MODULE:CLASS]
       [any field of the recipe]

Train a detector, alone or with distillation, and evaluate it.

RECIPE is a name from `fastkd recipes` or a recipe.json written by an earlier run.
Everything of a recipe can be changed, e.g. --seed 1 --schedule.steps 1000 --data.root my-data;
`fastkd train RECIPE --help` shows all fields with their values.

  your own images   fastkd train custom-retinanet-baseline --data.root my-data
                    where my-data holds annotations/train.json, annotations/val.json (COCO format), train/ and val/;
                    steps, sides, anchors and rates are chosen from the annotations (docs/custom-data.md)
  interrupted?      give the same command again with --resume; it continues where it stopped, bit for bit
  other batches     --scale-batch 4 takes 4 images a step and scales learning rates and steps along
  own detector      --detector my_module:MyDetector trains a class with features, loss, detect and parts; given again
                    it allows the class of a teacher's file (fastkd/detectors/own.py)
  several GPUs      torchrun --nproc-per-node 8 -m fastkd.cli train RECIPE ...      (machines, SLURM: docs/scaling.md)
"""


def find_recipe(name: str, args: Sequence[str] = ()):
    """The recipe with a name, or in a recipe.json file; a custom recipe is fitted to the data set that `args` name.

    Raises: ValueError with the nearest names if there is none.
    """
    from fastkd.training.config import Recipe
    from fastkd.training.recipes.custom import summary
    from fastkd.training.recipes.named import fitted_recipe

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"RECIPE must be a recipe's name or a recipe.json, got {name}, which does not exist")
        try:
            return Recipe.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"RECIPE must be a recipe.json of this version, got {name}: {error}") from error
    recipe, facts = fitted_recipe(name, args)
    if facts is not None and os.environ.get("RANK", "0") == "0":
        say(f"{name}: {summary(facts, recipe.detector.detector)}")
    return recipe


def split_recipe(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits the arguments of `train` into the recipe, at any position, and the others."""
    from fastkd.training.recipes.named import recipe_names

    args = list(args)
    names = set(recipe_names())
    known = [position for position, arg in enumerate(args) if arg in names]
    position = known[0] if known else 0
    if not args or args[position].startswith("-"):
        return None, args
    return args[position], args[:position] + args[position + 1 :]


def main(args: Sequence[str]) -> None:
    """Run `fastkd train` with the arguments after the word `train`."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    name, rest = split_recipe(args)
    if name is None:
        raise ValueError(
            "train: RECIPE must be given first, e.g. fastkd train scenes-retinanet-lgd; see `fastkd recipes`"
        )
    recipe, options = parse(name, rest)
    run(recipe, **options)


def parse(name: str, args: Sequence[str]) -> tuple:
    """Parses the recipe `name` with the overrides in `args`, and the options run_dir, resume and device."""
    import tyro

    from fastkd.training.recipes.options import typed, untyped, with_detector
    from fastkd.training.recipes.scaling import scale_to_batch

    detectors, args = take_detectors(args)
    recipe = find_recipe(name, args)
    default = typed(with_detector(recipe, detectors[0]) if detectors else recipe)
    kind: Any = type(default)  # made at run time, with the fields of the recipe's method

    def train(
        recipe: Annotated[tyro.conf.AvoidSubcommands[kind], tyro.conf.arg(name="")] = default,
        run_dir: Path = Path("runs") / default.name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        device: str = "auto",
        scale_batch: Annotated[int | None, tyro.conf.arg(metavar="IMAGES")] = None,
    ) -> tuple:
        """Train a recipe. The defaults shown are the recipe's own.

        Args:
            recipe: The recipe.
            run_dir: Folder for checkpoints, logs and results.
            resume: Continue from the newest checkpoint in the run directory; start if there is none.
            device: auto, cpu, cuda or cuda:N.
            scale_batch: Batch size that also scales learning rates (* new / old) and steps (* old / new).
                --schedule.batch-size changes neither.
        """
        recipe = untyped(recipe)
        if scale_batch is not None:
            recipe = scale_to_batch(recipe, scale_batch)
        else:
            warn_of_batch_size(default, recipe)
        return recipe, {"run_dir": run_dir, "resume": resume, "device": device}

    return tyro.cli(train, args=list(args), prog=f"fastkd train {name}")


def warn_of_batch_size(default, recipe) -> None:
    """Log a warning if the batch size was changed and the learning rate was not."""
    size, rate = recipe.schedule.batch_size, recipe.optimizer.learning_rate
    if size != default.schedule.batch_size and rate == default.optimizer.learning_rate:
        log.warning(
            "train: learning rate %g was set for batches of %d, got %d; --scale-batch %d scales rates and steps along",
            rate,
            default.schedule.batch_size,
            size,
            size,
        )


def run(recipe, *, run_dir: Path, resume: bool, device: str) -> None:
    """Train and print the metrics."""
    from fastkd.training import train

    result = train(recipe, run_dir, resume=resume, device=device_argument(device))
    if result.exit_code:
        raise Interrupted.with_exit_code(result.exit_code)


def train(recipe: str) -> None:
    """Train a detector, alone or with distillation. See `fastkd train --help`.

    Args:
        recipe: A name from fastkd recipes.
    """
    raise AssertionError(f"`fastkd train {recipe}` is parsed by main above; this function only lists it in the help")


def recipes() -> None:
    """List the recipes that `fastkd train` knows."""
    from rich.console import Console
    from rich.table import Table

    from fastkd.training.recipes.named import all_recipes
    from fastkd.training.recipes.papers import published_ap

    table = Table(header_style="bold")
    for column in ("recipe", "backbone", "method", "steps", "published AP"):
        table.add_column(column, no_wrap=True, justify="right" if column == "steps" else "left")
    for name, recipe in all_recipes().items():
        width = "" if recipe.detector.width == 1 else f" x {recipe.detector.width:g}"
        method = recipe.method.label if recipe.method else "-"
        method += " + inherit" if recipe.inherit and recipe.method else ""
        method = "inherit" if recipe.inherit and not recipe.method else method
        table.add_row(
            name,
            recipe.detector.backbone + width + (" DCNv2" if recipe.detector.deformable else ""),
            method,
            "by data" if name.startswith("custom-") else str(recipe.schedule.steps),
            published_ap(name),
        )
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    say("published AP: box AP on COCO val as the papers report it; - where none does. Nothing of it is fastkd's own")
    say("fastkd train RECIPE runs one; fastkd train RECIPE --help shows every field")
