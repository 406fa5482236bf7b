"""The named recipes: family x detector x method. `fastkd train NAME` runs one.

    scenes-teacher, scenes-<detector>-teacher      the teachers, larger detectors
    scenes-resnet18-backbone, scenes-resnet34-backbone   pretrain the backbones of students and teachers
    scenes-<detector>-{baseline,inherit,<method>}
    coco-<detector>-{teacher,baseline,inherit,<method>}
    <detector>: retinanet, fcos, faster-rcnn, mask-rcnn, atss, poto, condinst, solov2
    <method>: the kinds of fastkd.training.methods.WITH_RECIPES, for the detectors that the method supports
    coco-<detector>-<backbone>-...  the other rows of the papers' tables: see papers.py
    {scenes,coco}-<detector>-lgdicd   both methods on one student (pairs.py)
    {crowd,crowdhuman}-faster-rcnn-{baseline,lgd}   (crowd.py)
    custom-<detector>-{teacher,baseline,inherit,<method>}   for one's own small data set, fitted to it (custom.py)

Any recipe trains on another COCO-format data set by overriding `data`: --data.root, --data.train-annotations, ...
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data import open_dataset
from fastkd.data.facts import DataFacts, measure_facts
from fastkd.detectors import DetectorConfig
from fastkd.detectors.config import WITHOUT_ANCHORS
from fastkd.training.config import DataConfig, OptimizerConfig, Recipe, RuntimeConfig, Schedule
from fastkd.training.methods import WITH_RECIPES, Method, Setup
from fastkd.training.recipes.crowd import CROWD_RECIPES
from fastkd.training.recipes.custom import DATA, NOMINAL, data_options, fit
from fastkd.training.recipes.options import typed, untyped
from fastkd.training.recipes.pairs import PAIRS, pair_of
from fastkd.training.recipes.papers import ROWS, SCHEDULES, apply_row

DETECTORS = {
    "retinanet": "retinanet",
    "fcos": "fcos",
    "faster-rcnn": "faster_rcnn",
    "mask-rcnn": "mask_rcnn",
    "atss": "atss",
    "poto": "poto",
    "condinst": "condinst",
    "solov2": "solov2",
}
METHODS: dict[str, type[Method]] = {method.kind: method for method in WITH_RECIPES}
PLAIN = ("teacher", "baseline", "inherit")  # recipes without a method
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
SHIPPED_TEACHERS = ("retinanet", "fcos", "faster-rcnn")
STUDENT_BACKBONE, TEACHER_BACKBONE = "scenes-resnet18-backbone", "scenes-resnet34-backbone"


@dataclass(frozen=True)
class ScenesNumbers:
    """The tuned hyper-parameters of the scenes recipes; those of methods are in training/methods.

    Tuned on the plain student (rate, clipping, warm-up, anchors, steps), never on a method: all students share them,
    and teachers take the same rate, clipping and warm-up. The students' backbone begins at random and keeps a higher
    rate without clipping: with theirs it has 20.1 AP after its 3,000 steps instead of 24.6.
    Objects are 8 .. 80 pixels wide and nearly square, hence few and small anchors; the pyramid is narrow, so that
    training runs on two CPU cores.
    """

    dense_steps: int = 600
    two_stage_steps: int = 400
    teacher_steps: int = 1200
    backbone_steps: int = 3000
    teacher_backbone_steps: int = 4500
    batch_size: int = 16
    num_classes: int = 10
    student_backbone: str = "resnet18"
    student_width: float = 0.25
    teacher_backbone: str = "resnet34"
    teacher_width: float = 0.375
    channels: int = 64
    head_convs: int = 2
    anchor_base: float = 3.0
    dense_anchor_scales: tuple[float, ...] = (0.6, 1.0, 1.41)
    backbone_anchors: tuple[float, tuple[float, ...]] = (1.5, (1.0, 1.41))
    rate: float = 1.5e-3
    clip_norm: float = 2.0
    warmup: float = 0.1
    backbone_rate: float = 3e-3
    backbone_warmup: float = 0.05
    weight_decay: float = 0.05


SCENES = ScenesNumbers()


@functools.cache  # the list of all names asks for it 144 times
def _scenes_detector(detector: str, *, teacher: bool) -> DetectorConfig:
    """The small detectors of the scenes recipes; the teacher is deeper and wider with the same pyramid and head."""
    numbers, two_stage = SCENES, detector in TWO_STAGE
    anchors: dict[str, Any] = {"anchor_base": numbers.anchor_base}
    if detector not in WITHOUT_ANCHORS:
        anchors |= {"anchor_scales": (1.0,) if two_stage else numbers.dense_anchor_scales, "anchor_ratios": (1.0,)}
    return DetectorConfig(
        detector=detector,
        num_classes=numbers.num_classes,
        backbone=numbers.teacher_backbone if teacher else numbers.student_backbone,
        width=numbers.teacher_width if teacher else numbers.student_width,
        channels=numbers.channels,
        norm="bn" if teacher else "frozen_bn",
        head_convs=numbers.head_convs,
        head_norm="gn" if detector in ("retinanet", "condinst") else "none",
        rpn_pre_nms_train=200,
        rpn_pre_nms_test=200,
        rpn_post_nms_train=100,
        rpn_post_nms_test=100,
        rpn_samples=64,
        roi_samples=48,
        roi_canonical_size=64,
        box_head_channels=256,
        mask_head_channels=64,
        mask_branch_channels=32,
        instance_head_channels=64,
        kernel_channels=64,
        grids=(16, 14, 10, 6, 4),  # cells of at least 8 pixels, for objects of 8 .. 80 pixels in images of 128
        **anchors,
    )


def _scenes_adamw(rate: float, warmup: float, clip_norm: float | None) -> OptimizerConfig:
    return OptimizerConfig(
        kind="adamw",
        learning_rate=rate,
        weight_decay=SCENES.weight_decay,
        clip_norm=clip_norm,
        decay="cosine",
        warmup=warmup,
    )


def scenes_recipe(detector_name: str, method_name: str) -> Recipe:
    """A recipe on the generated scenes; `method_name` may also be "teacher"."""
    detector, numbers = DETECTORS[detector_name], SCENES
    teacher = method_name == "teacher"
    config = _scenes_detector(detector, teacher=teacher)
    setup = METHODS[method_name].on_scenes(config) if method_name in METHODS else None
    steps = numbers.two_stage_steps if detector in TWO_STAGE else numbers.dense_steps
    return Recipe(
        name=f"scenes-{detector_name}-{method_name}",
        detector=config,
        data=DataConfig(),
        method=setup.method if setup else None,
        teacher=_scenes_teacher(detector_name) if _needs_teacher(method_name, setup) else None,
        inherit=_inherits(method_name, setup),
        backbone_weights=(
            f"runs/{TEACHER_BACKBONE}/student.safetensors" if teacher else f"asset:{STUDENT_BACKBONE}.safetensors"
        ),
        optimizer=_scenes_adamw(numbers.rate, numbers.warmup, numbers.clip_norm),
        method_optimizer=setup.optimizer if setup else None,
        schedule=Schedule(steps=numbers.teacher_steps if teacher else steps, batch_size=numbers.batch_size),
    )


def _inherits(method_name: str, setup: Setup | None) -> bool:
    return method_name == "inherit" or (setup is not None and setup.inherit)


def _needs_teacher(method_name: str, setup: Setup | None) -> bool:
    return _inherits(method_name, setup) or (setup is not None and setup.method.needs_teacher)


def _scenes_teacher(detector_name: str) -> str:
    """The shipped teacher if there is one, else the output file of the recipe scenes-<detector>-teacher."""
    name = f"scenes-{detector_name}-teacher"
    return f"asset:{name}.safetensors" if detector_name in SHIPPED_TEACHERS else f"runs/{name}/student.safetensors"


def scenes_backbone_recipe(*, teacher: bool) -> Recipe:
    """Trains a RetinaNet from random weights, of which other recipes use only the backbone.

    The students' backbone is trained on other scenes (seed 1), the teachers' on the students' training scenes.
    """
    numbers, plain = SCENES, scenes_recipe("retinanet", "teacher" if teacher else "baseline")
    base, scales = numbers.backbone_anchors
    detector = dataclasses.replace(plain.detector, norm="bn", anchor_base=base, anchor_scales=scales)
    return dataclasses.replace(
        plain,
        name=TEACHER_BACKBONE if teacher else STUDENT_BACKBONE,
        detector=detector,
        data=plain.data if teacher else dataclasses.replace(plain.data, root="data/scenes-pretrain"),
        backbone_weights=None,
        optimizer=(plain.optimizer if teacher else _scenes_adamw(numbers.backbone_rate, numbers.backbone_warmup, None)),
        schedule=dataclasses.replace(
            plain.schedule, steps=numbers.teacher_backbone_steps if teacher else numbers.backbone_steps
        ),
    )


def coco_recipe(detector_name: str, method_name: str) -> Recipe:
    """A COCO recipe with the published hyper-parameters: R50 students 1x (LGD 2x), R101 teachers 3x."""
    detector = DETECTORS[detector_name]
    teacher = method_name == "teacher"
    backbone = "resnet101" if teacher else "resnet50"
    config = DetectorConfig(detector=detector, num_classes=80, backbone=backbone, norm="frozen_bn", frozen_stages=2)
    setup = METHODS[method_name].published(config) if method_name in METHODS else None
    steps, milestones = SCHEDULES["3x" if teacher else setup.schedule if setup is not None else "1x"]
    return Recipe(
        name=f"coco-{detector_name}-{method_name}",
        detector=config,
        data=DataConfig(
            root="data/coco",
            train_annotations="annotations/instances_train2017.json",
            train_images="train2017",
            val_annotations="annotations/instances_val2017.json",
            val_images="val2017",
            short_sides=(640, 672, 704, 736, 768, 800),
            val_short_side=800,
            max_side=1333,
            workers=4,
        ),
        method=setup.method if setup else None,
        teacher=f"runs/coco-{detector_name}-teacher/student.safetensors"
        if _needs_teacher(method_name, setup)
        else None,
        inherit=_inherits(method_name, setup),
        backbone_weights=f"weights/{backbone}.pth",
        optimizer=OptimizerConfig(
            learning_rate=0.02 if detector in TWO_STAGE else 0.01, milestones=milestones, warmup=1000 / steps
        ),
        method_optimizer=setup.optimizer if setup else None,
        schedule=Schedule(steps=steps, batch_size=16),
        runtime=RuntimeConfig(log_every=50, checkpoint_every=5000),
    )


def recipe_names() -> list[str]:
    """The names of all recipes."""
    rest = [
        f"{family}-{detector}-{method}"
        for family in ("scenes", "coco", "custom")
        for detector in DETECTORS
        for method in (*PLAIN, *METHODS, *PAIRS)
        if method not in METHODS or METHODS[method].unfit(_scenes_detector(DETECTORS[detector], teacher=False)) is None
    ]
    return ["scenes-teacher", STUDENT_BACKBONE, TEACHER_BACKBONE, *rest, *ROWS, *CROWD_RECIPES]


def get_recipe(name: str, facts: DataFacts | None = None, data: DataConfig = DATA) -> Recipe:
    """The recipe of a name; "scenes-teacher" is the RetinaNet teacher.

    Args:
        facts, data: for custom recipes, a training set and its paths; None fits the recipe to a nominal set.
    Raises: ValueError with the nearest names.
    """
    if name == "scenes-teacher":
        return scenes_recipe("retinanet", "teacher")
    if name in (STUDENT_BACKBONE, TEACHER_BACKBONE):
        return scenes_backbone_recipe(teacher=name == TEACHER_BACKBONE)
    if name in CROWD_RECIPES:
        return CROWD_RECIPES[name](name)
    if name not in recipe_names():
        names = recipe_names()
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"get_recipe: name must be one of those that `fastkd recipes` lists, got {name!r}; "
            f"nearest: {', '.join(near)}"
        )
    if name in ROWS:
        row = ROWS[name]
        return dataclasses.replace(apply_row(coco_recipe(row.detector, row.method), row), name=name)
    family, rest = name.split("-", 1)
    detector, method = rest.rsplit("-", 1)
    if method in PAIRS:
        combined, parts = PAIRS[method]
        of_parts = (get_recipe(f"{family}-{detector}-{part}", facts, data) for part in parts)
        return pair_of(combined, *of_parts, name=name)
    if family == "custom":
        return fit(scenes_recipe(detector, method), facts or NOMINAL, data)
    return (scenes_recipe if family == "scenes" else coco_recipe)(detector, method)


def all_recipes() -> dict[str, Recipe]:
    """Every named recipe."""
    return {name: get_recipe(name) for name in recipe_names()}


def fitted_recipe(name: str, args: Sequence[str] = ()) -> tuple[Recipe, DataFacts | None]:
    """The recipe of a name, a custom one fitted to the data set that the arguments name, and the facts of that set.

    With --help in the arguments nothing is read: the recipe for a nominal set is shown.

    Raises: FileNotFoundError or ValueError if the training annotations are missing or malformed.
    """
    if not name.startswith("custom-") or name not in recipe_names() or {"-h", "--help"} & set(args):
        return get_recipe(name), None
    data = data_options(args)
    root = Path(data.root)
    train_set = open_dataset(
        data.format, root / data.train_annotations, root / data.train_images, crowd_boxes=data.crowd_boxes
    )
    facts = measure_facts(train_set)
    return get_recipe(name, facts, data), facts


def parse_cli(name: str, args: Sequence[str]) -> Recipe:
    """A named recipe with command-line overrides, e.g. ["--schedule.steps", "100", "--data.root", "my-data"].

    Exits with a help text on --help and with code 2 on an unknown or ill-typed option (as argparse does); raises
    ValueError where the values contradict each other.
    """
    import tyro  # only the command line needs it

    recipe = typed(fitted_recipe(name, args)[0])
    flat: Any = tyro.conf.AvoidSubcommands  # of a class made at run time, with the fields of the recipe's method
    parsed = tyro.cli(
        flat[type(recipe)],
        default=recipe,
        args=list(args),
        prog=f"fastkd train {name}",
        description=f"Train {name}. Shown defaults are the recipe's own.",
    )
    return untyped(parsed)
