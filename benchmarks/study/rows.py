"""The studies: the trained recipes and their controls."""

from __future__ import annotations

from dataclasses import dataclass

# name in the tables -> key in metrics.json; for MR lower is better
METRICS = {
    "AP": ("bbox", "AP"),
    "AP50": ("bbox", "AP50"),
    "AP75": ("bbox", "AP75"),
    "mask AP": ("segm", "AP"),
    "MR": ("bbox", "MR"),
    "JI": ("bbox", "JI"),
}


# execution path of a recipe -> arguments of `fastkd train`, used by a run "recipe@path"
PATHS = {
    "reference": ("--runtime.ops", "reference", "--runtime.precision", "float32", "--runtime.no-channels-last"),
    "float32": ("--runtime.precision", "float32", "--runtime.no-channels-last"),
    "bfloat16": ("--runtime.precision", "bfloat16", "--runtime.channels-last"),
    "compile": ("--runtime.precision", "bfloat16", "--runtime.channels-last", "--runtime.compile"),
}


@dataclass(frozen=True)
class Row:
    """One row of a table: a run and its control.

    Args:
        run: name of a recipe, or "recipe@path" with a path of PATHS.
        label: name in the table.
        control: run to compare with, by the same metric; None for a baseline.
        metric: one of METRICS. A run may have rows for several metrics; it is trained once.
    """

    run: str
    label: str
    control: str | None
    metric: str = "AP"


def arguments_of(run: str) -> list[str]:
    """Arguments of `fastkd train` for a run: its recipe and the options of its path."""
    recipe, _, path = run.partition("@")
    return [recipe, *(PATHS[path] if path else ())]


@dataclass(frozen=True)
class Study:
    """A table of rows.

    Args:
        title: of the page.
        about: common properties of the runs, in one sentence.
        rows: in the table's order.
        data: arguments of `fastkd data` that generate the training data.
    """

    title: str
    about: str
    rows: tuple[Row, ...]
    data: tuple[tuple[str, ...], ...]

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


def _by_every_path(recipe: str, label: str) -> tuple[Row, ...]:
    """A recipe in plain torch and float32, and each faster path compared with it."""
    control = f"{recipe}@reference"
    return (
        Row(control, f"{label}, plain torch ops, float32", None),
        Row(f"{recipe}@float32", f"{label}, compiled ops, float32", control),
        Row(f"{recipe}@bfloat16", f"{label}, compiled ops, bfloat16", control),
        Row(f"{recipe}@compile", f"{label}, compiled ops, bfloat16, torch.compile", control),
    )


SCENES_DATA = ("scenes", "--train", "8000", "--val", "500")
STUDIES = {
    "scenes": Study(
        title="Scenes: does distillation teach?",
        about="8,000 training and 500 validation images (`fastkd data scenes`, seed 0), box AP by pycocotools.",
        rows=(
            Row("scenes-retinanet-baseline", "RetinaNet baseline", None),
            Row("scenes-retinanet-lgd", "RetinaNet + LGD", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-fgfi", "RetinaNet + FGFI", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-pkd", "RetinaNet + PKD", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-cwd", "RetinaNet + CWD", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-scorel2", "RetinaNet + score-weighted L2", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-inherit", "RetinaNet inheriting (control of ICD)", "scenes-retinanet-baseline"),
            Row("scenes-retinanet-icd", "RetinaNet + ICD (inheriting)", "scenes-retinanet-inherit"),
            Row("scenes-faster-rcnn-baseline", "Faster R-CNN baseline", None),
            Row("scenes-faster-rcnn-lgd", "Faster R-CNN + LGD", "scenes-faster-rcnn-baseline"),
            Row(
                "scenes-faster-rcnn-inherit", "Faster R-CNN inheriting (control of ICD)", "scenes-faster-rcnn-baseline"
            ),
            Row("scenes-faster-rcnn-icd", "Faster R-CNN + ICD (inheriting)", "scenes-faster-rcnn-inherit"),
        ),
        data=(SCENES_DATA,),
    ),
    "detectors": Study(
        title="Scenes and crowds: the other detectors, and both methods on one student",
        about="Scenes as in [scenes.md](scenes.md); crowds: 4,000 training and 400 validation images (`fastkd data "
        "crowd`, seed 0), log-average miss rate MR (smaller is better), AP and JI by CrowdHuman's definitions.",
        rows=(
            *_with_lgd("scenes-atss", "ATSS", AP=""),
            *_with_lgd("scenes-fcos", "FCOS", AP=""),
            *_with_lgd("scenes-poto", "POTO", AP=""),
            *_with_lgd("scenes-mask-rcnn", "Mask R-CNN", **{"AP": ", boxes", "mask AP": ", masks"}),
            *_with_lgd("crowd-faster-rcnn", "Crowd, Faster R-CNN", MR=", MR", AP=", AP", JI=", JI"),
            Row("scenes-retinanet-icd", "RetinaNet + ICD (inheriting)", None),
            Row("scenes-retinanet-lgdicd", "RetinaNet + ICD + LGD", "scenes-retinanet-icd"),
        ),
        data=(SCENES_DATA, ("crowd", "--train", "4000", "--val", "400")),
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
