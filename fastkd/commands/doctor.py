"""`fastkd doctor`: checks a recipe before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastkd.commands.common import device_argument, say, take_detectors
from fastkd.commands.train import find_recipe, split_recipe
from fastkd.progress import showing
from fastkd.text import printable

USAGE = """usage: fastkd doctor RECIPE [--batches N] [--device DEVICE] [--run-dir DIR] [any field of the recipe]

Look for what makes a distilled run gain nothing, before it costs a day: class tables, the teacher's AP, inherited
tensors, the distillation loss and its share of the gradient level by level, memory, the loader, the time it will take.
With --run-dir also whether the loss of a run of the recipe jumped, and whether its method had anything to teach.
Takes the options of `fastkd train`; exits with 2 if there is a problem.
"""
MARKS = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "problem": ("PROBLEM", "bold red")}


class RecipeProblems(RuntimeError):
    """The recipe has problems; the message states their number."""


def main(args: Sequence[str]) -> None:
    """Run `fastkd doctor` with the arguments after the word `doctor`.

    Raises: RecipeProblems if anything is likely to spoil the run.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    name, rest = split_recipe(args)
    if name is None:
        raise ValueError("doctor: RECIPE must be given first, e.g. fastkd doctor scenes-retinanet-icd")
    run(*parse(name, rest))


def parse(name: str, args: Sequence[str]) -> tuple:
    """Parses the recipe `name` with overrides, the number of batches, the device and an earlier run's directory."""
    import tyro

    from fastkd.training.recipes.options import typed, untyped, with_detector

    detectors, args = take_detectors(args)
    recipe = find_recipe(name, args)
    default = typed(with_detector(recipe, detectors[0]) if detectors else recipe)
    kind: Any = type(default)  # made at run time, with the fields of the recipe's method

    def doctor(
        recipe: Annotated[tyro.conf.AvoidSubcommands[kind], tyro.conf.arg(name="")] = default,
        batches: int = 4,
        device: str = "auto",
        run_dir: Path | None = None,
    ) -> tuple:
        """Examine a recipe. The defaults shown are the recipe's own.

        Args:
            recipe: The recipe.
            batches: Number of batches to evaluate the teacher and the losses on.
            device: auto, cpu, cuda or cuda:N.
            run_dir: Directory of a run of the recipe, finished or not, to check its log.
        """
        return untyped(recipe), batches, device, run_dir

    return tyro.cli(doctor, args=list(args), prog=f"fastkd doctor {name}")


def run(recipe, batches: int, device: str, run_dir: Path | None = None) -> None:
    """Check the recipe and print one line per finding."""
    from rich.console import Console
    from rich.text import Text

    from fastkd.training.doctor.checks import examine

    console, counts = Console(soft_wrap=True), dict.fromkeys(MARKS, 0)
    findings = examine(recipe, batches=batches, device=device_argument(device), run_dir=run_dir)
    while True:
        with showing("examine the recipe"):
            finding = next(findings, None)
        if finding is None:
            break
        mark, style = MARKS[finding.status]
        counts[finding.status] += 1
        line = printable(f"{finding.check:11}{finding.message}")
        console.print(Text(f"{mark:8}", style=style) + Text(line, style=""))
    if counts["problem"]:
        raise RecipeProblems(f"doctor: {recipe.name} has {counts['problem']} problem(s), see above")
    rest = f", {counts['warning']} thing(s) to look at" if counts["warning"] else ""
    say(f"{recipe.name}: no problem found{rest}")


def doctor(recipe: str) -> None:
    """Check a recipe before training for the usual reasons why distillation fails. See `fastkd doctor --help`.

    Args:
        recipe: A name from fastkd recipes.
    """
    raise AssertionError(f"`fastkd doctor {recipe}` is parsed by main above; this function only lists it in the help")
