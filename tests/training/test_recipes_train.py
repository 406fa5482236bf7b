"""Every named recipe trains: its own detector, method and optimisers, made narrow, two steps on the tiny scenes."""

import dataclasses

import pytest
import torch
from tiny_runs import CLASSES, KINDS, make_tiny_data, some_recipes, teacher_file, tiny_detector

from fastkd.data import build_train_loader, generate_crowd
from fastkd.training import all_recipes, get_recipe, sum_losses
from fastkd.training.build import build
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.optimizers import build_optimizers
from fastkd.training.schedule import Phase

NAMES = {kind: name for name, kind in KINDS.items()}
# Sizes that only cost time; what a recipe is about (backbone, anchors, norms, ratios, thresholds ...) stays its own.
NARROW = (
    "width",
    "channels",
    "head_convs",
    "box_head_channels",
    "mask_head_channels",
    "mask_branch_channels",
    "instance_head_channels",
    "kernel_channels",
    "grids",
    "rpn_pre_nms_train",
    "rpn_post_nms_train",
    "roi_samples",
    "rpn_samples",
    "detections_per_image",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data by format: the tiny scenes and a tiny crowd."""
    crowd = tmp_path_factory.getbasetemp() / "tiny-crowd"
    generate_crowd(crowd, train=6, val=2, seed=3, processes=1)
    return {"coco": make_tiny_data(tmp_path_factory), "crowdhuman": crowd}


def narrow(recipe):
    """The recipe at toy size, without the places of its files. Recipes that differ in steps alone become the same."""
    kind, crowd = NAMES[recipe.detector.detector], recipe.data.format == "crowdhuman"
    tiny = tiny_detector(kind)
    sizes = {name: getattr(tiny, name) for name in NARROW} | {"num_classes": 1 if crowd else CLASSES}
    return dataclasses.replace(
        recipe,
        name="narrow",
        detector=dataclasses.replace(recipe.detector, **sizes),
        data=dataclasses.replace(
            get_recipe("crowd-faster-rcnn-lgd" if crowd else "scenes-retinanet-lgd").data,
            root="",
            short_sides=(64,),
            val_short_side=64,
            max_side=96,
            workers=0,
        ),
        teacher=kind if recipe.teacher else None,
        backbone_weights=None,
        optimizer=without_schedule(recipe.optimizer),
        method_optimizer=without_schedule(recipe.method_optimizer),
        schedule=Schedule(steps=10, batch_size=2),
        runtime=RuntimeConfig(precision="float32", ledger_pairs=0),
    )


def without_schedule(optimizer):
    return optimizer and dataclasses.replace(optimizer, milestones=(), warmup=0.0)


def placed(recipe, folders):
    """A narrow recipe with its files."""
    data = dataclasses.replace(recipe.data, root=str(folders[recipe.data.format]))
    teacher = recipe.teacher and str(teacher_file(folders["coco"], recipe.teacher))
    return dataclasses.replace(recipe, data=data, teacher=teacher)


def groups():
    """Names of recipes that become the same narrow one, by the first of them."""
    found = {}
    for name, recipe in all_recipes().items():
        found.setdefault(repr(narrow(recipe)), []).append(name)
    return {names[0]: names for names in found.values()}


GROUPS = groups()


def test_every_recipe_is_in_a_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(all_recipes())


@pytest.mark.parametrize("name", some_recipes(list(GROUPS), "training"))
def test_the_recipe_trains(folders, name):
    recipe = placed(narrow(get_recipe(name)), folders)
    built = build(recipe)
    module = built.module.train()
    for key, values in module.detector.named_buffers():
        if key.endswith("bn3.weight"):  # frozen norms of random weights do not normalise: 33 blocks would overflow
            values.fill_(0.2)
    optimizers = build_optimizers(recipe, module)
    loader = build_train_loader(built.train_set, batch_size=2, total_steps=1, short_sides=(64,), max_side=96)
    batch = next(iter(loader))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for number in range(2):
        torch.manual_seed(number)
        losses = module(batch, Phase(distill=recipe.method is not None))
        assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values()), losses
        sum_losses(losses).backward()
        for optimizer in optimizers:
            optimizer.set_rate(5, 10)
            optimizer.step()
    after = module.state_dict()
    moved = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    learns = module.distiller is not None and any(p.requires_grad for p in module.distiller.parameters())
    assert "detector" in moved and ("distiller" in moved) == learns
    if recipe.method is not None:
        assert set(losses) - set(detector_losses(module, batch)), "the method has losses of its own"


def detector_losses(module, batch):
    with torch.no_grad():
        return module(batch, Phase(distill=False))
