"""The studies: the trained recipes and their controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkd.training import get_recipe

# name in the tables -> key in metrics.json; for MR lower is better
METRICS = {
    "AP": ("bbox", "AP"),
    "AP50": ("bbox", "AP50"),
    "AP75": ("bbox", "AP75"),
    "mask AP": ("segm", "AP"),
    "MR": ("bbox", "MR"),
    "JI": ("bbox", "JI"),
}


def _options(values: dict[str, Any]) -> tuple[str, ...]:
    """Arguments of `fastkd train` for some values of a recipe."""
    return tuple(text for name, value in values.items() for text in (f"--{name}", str(value)))


# execution path of a recipe -> arguments of `fastkd train`, used by a run "recipe@path"
PATHS = {
    "reference": ("--runtime.ops", "reference", "--runtime.precision", "float32", "--runtime.no-channels-last"),
    "float32": ("--runtime.precision", "float32", "--runtime.no-channels-last"),
    "bfloat16": ("--runtime.precision", "bfloat16", "--runtime.channels-last"),
    "compile": ("--runtime.precision", "bfloat16", "--runtime.channels-last", "--runtime.compile"),
}
# other changes of a recipe, used in the same way
CHANGES = {
    "inherit": ("--inherit",),
    "fresh": ("--no-inherit",),
    # LGD in a long run: imitation from a fifth of the run to its end
    "lesson": _options(
        {
            "method.weight": 0.5,
            "method.instructive-weight": 0.1,
            "method.detach-fraction": 0.2,
            "method.final-fraction": 0,
        }
    ),
}
LONGER = 5 / 3  # times the steps, in a run "recipe@long": about as long as a method takes for the recipe's own
FLOAT32 = ("--runtime.precision", "float32")  # the same on CPUs with and without bfloat16 instructions


TAUGHT = {"fgfi": "FGFI", "pkd": "PKD", "cwd": "CWD", "scorel2": "score-weighted L2"}  # do not inherit in their recipes


@dataclass(frozen=True)
class Row:
    """One row of a table: a run and its control.

    Args:
        run: name of a recipe, or "recipe@change" with a path of PATHS, one of CHANGES, or "long".
        label: name in the table.
        control: run to compare with, by the same metric; None for a baseline.
        metric: one of METRICS. A run may have rows for several metrics; it is trained once.
    """

    run: str
    label: str
    control: str | None
    metric: str = "AP"


def arguments_of(run: str) -> list[str]:
    """Arguments of `fastkd train` for a run: its recipe and the options of its path or change."""
    recipe, _, change = run.partition("@")
    if change == "long":
        return [recipe, "--schedule.steps", str(round(LONGER * get_recipe(recipe).schedule.steps))]
    return [recipe, *((PATHS | CHANGES)[change] if change else ())]


@dataclass(frozen=True)
class Study:
    """A table of rows.

    Args:
        title: of the page.
        about: common properties of the runs, in one sentence.
        rows: in the table's order.
        data: arguments of `fastkd data` that generate the training data.
        options: arguments of `fastkd train` for all runs.
    """

    title: str
    about: str
    rows: tuple[Row, ...]
    data: tuple[tuple[str, ...], ...]
    options: tuple[str, ...] = ()

    @property
    def runs(self) -> list[str]:
        """The runs of all rows, without duplicates."""
        return list(dict.fromkeys(row.run for row in self.rows))


def _with_lgd(family: str, label: str, **names: str) -> tuple[Row, ...]:
    """A detector alone and with LGD, for each metric. Args: names: metric -> suffix of the label."""
    baseline = f"{family}-baseline"
    return tuple(
        row
        for metric, ending in names.items()
        for row in (
            Row(baseline, f"{label} baseline{ending}", None, metric),
            Row(f"{family}-lgd", f"{label} + LGD{ending}", baseline, metric),
        )
    )


def _with_every_method(family: str, label: str) -> tuple[Row, ...]:
    """A detector alone, alone for longer, with each method, and the methods with a teacher beside inheriting, too."""
    baseline, inherit = f"{family}-baseline", f"{family}-inherit"
    rows = [
        Row(baseline, f"{label} baseline", None),
        Row(f"{baseline}@long", f"{label} baseline for longer", baseline),
        Row(f"{family}-lgd", f"{label} + LGD", baseline),
    ]
    rows += [Row(f"{family}-icd@fresh", f"{label} + ICD", baseline)]
    rows += [Row(f"{family}-{name}", f"{label} + {title}", baseline) for name, title in TAUGHT.items()]
    rows += [Row(inherit, f"{label} inheriting", baseline)]
    rows += [Row(f"{family}-icd", f"{label} inheriting + ICD", inherit)]
    rows += [
        Row(f"{family}-{name}@inherit", f"{label} inheriting + {title}", inherit) for name, title in TAUGHT.items()
    ]
    return tuple(rows)


def _by_every_path(recipe: str, label: str) -> tuple[Row, ...]:
    """A recipe in plain torch and float32, and each faster path compared with it."""
    control = f"{recipe}@reference"
    return (
        Row(control, f"{label}, plain torch ops, float32", None),
        Row(f"{recipe}@float32", f"{label}, compiled ops, float32", control),
        Row(f"{recipe}@bfloat16", f"{label}, compiled ops, bfloat16", control),
        Row(f"{recipe}@compile", f"{label}, compiled ops, bfloat16, torch.compile", control),
    )


DETECTORS = (("retinanet", "RetinaNet"), ("fcos", "FCOS"), ("faster-rcnn", "Faster R-CNN"))
SCENES_DATA = ("scenes", "--train", "8000", "--val", "500")
THEME_DATA = ("scenes", "--style", "theme", "--root", "data/theme", "--train", "4000", "--val", "500")
# The rate and the warm-up were chosen without a method (docs/results/findings.md).
LONG_RUNS = _options(
    {
        "data.root": "data/theme",
        "detector.anchor-base": 5,
        "schedule.steps": 5000,
        "optimizer.learning-rate": 7e-4,
        "optimizer.warmup": 0.05,
    }
)
STUDIES = {
    "scenes": Study(
        title="Scenes: does distillation teach?",
        about="8,000 training and 500 validation images (`fastkd data scenes`, seed 0), box AP by pycocotools.",
        rows=tuple(row for detector, label in DETECTORS for row in _with_every_method(f"scenes-{detector}", label)),
        data=(SCENES_DATA,),
        options=FLOAT32,
    ),
    "theme": Study(
        title="Theme: does LGD teach in a long run?",
        about="4,000 training and 500 validation images of large objects, one or two classes in a picture (`fastkd "
        "data scenes --style theme`, seed 0), 20 epochs, box AP by pycocotools.",
        rows=tuple(
            row
            for detector, label in DETECTORS
            for row in (
                Row(f"scenes-{detector}-baseline", f"{label} baseline", None),
                Row(f"scenes-{detector}-lgd@lesson", f"{label} + LGD", f"scenes-{detector}-baseline"),
            )
        ),
        data=(THEME_DATA,),
        options=(*LONG_RUNS, *FLOAT32),
    ),
    "detectors": Study(
        title="Scenes and crowds: the other detectors, and both methods on one student",
        about="Scenes as in [scenes.md](scenes.md); crowds: 4,000 training and 400 validation images (`fastkd data "
        "crowd`, seed 0), log-average miss rate MR (smaller is better), AP and JI by CrowdHuman's definitions.",
        rows=(
            *_with_lgd("scenes-atss", "ATSS", AP=""),
            *_with_lgd("scenes-poto", "POTO", AP=""),
            *_with_lgd("scenes-mask-rcnn", "Mask R-CNN", **{"AP": ", boxes", "mask AP": ", masks"}),
            *_with_lgd("crowd-faster-rcnn", "Crowd, Faster R-CNN", MR=", MR", AP=", AP", JI=", JI"),
            Row("scenes-retinanet-icd", "RetinaNet + ICD (inheriting)", None),
            Row("scenes-retinanet-lgdicd", "RetinaNet + ICD + LGD", "scenes-retinanet-icd"),
        ),
        data=(SCENES_DATA, ("crowd", "--train", "4000", "--val", "400")),
        options=FLOAT32,
    ),
    "paths": Study(
        title="Scenes: do the fast paths train to the same AP?",
        about="Scenes as in [scenes.md](scenes.md). A path is how a step is computed: the ops in plain torch (the "
        "specification) or compiled, float32 or bfloat16 in channels-last, with or without torch.compile.",
        rows=(
            *_by_every_path("scenes-retinanet-lgd", "RetinaNet + LGD"),
            *_by_every_path("scenes-retinanet-icd", "RetinaNet + ICD (inheriting)"),
        ),
        data=(SCENES_DATA,),
    ),
}
