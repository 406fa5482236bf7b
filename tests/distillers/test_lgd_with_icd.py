"""LGD and ICD on one student: both losses with the gradients of each alone, phases, optimisers, a whole run."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_recipe

from fastkd.data import build_train_loader
from fastkd.detectors import load_detector
from fastkd.training import LGDICDConfig, Recipe, Schedule, get_recipe, parse_cli, train, trainer
from fastkd.training.build import build
from fastkd.training.optimizers import build_optimizers
from fastkd.training.recipes.pairs import pair_of
from fastkd.training.schedule import Phase, phase_at
from fastkd.training.step import StepModule, sum_losses

ON = Phase()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def tiny_pair(scenes, kind="retinanet", **changes):
    return tiny_recipe(scenes, kind, "lgdicd", **changes)


def test_losses_are_those_of_each_alone(scenes):
    """The same weights and seeds: the pair's losses are LGD's and ICD's, and gradients add up."""
    built = build(tiny_pair(scenes))
    module, batch = built.module, next(iter(build_train_loader(built.train_set, batch_size=2, total_steps=1)))
    lgd = StepModule(module.detector, module.distiller["lgd"])
    icd = StepModule(module.detector, module.distiller["icd"], module.teacher)
    weight = module.detector.neck.layer_blocks[0][0].weight

    def run(step, phase=ON):
        torch.manual_seed(5)
        losses = step(batch, phase)
        (gradient,) = torch.autograd.grad(sum_losses(losses), weight)
        return losses, gradient

    (both, sum_gradient), (one, first), (other, second) = run(module), run(lgd), run(icd)
    plain, alone = run(StepModule(module.detector), Phase(distill=False))
    assert both.keys() == one.keys() | other.keys() and {"lgd_distill", "icd_distill"} < both.keys()
    for name, value in both.items():
        torch.testing.assert_close(value, (one | other)[name])
    torch.testing.assert_close(sum_gradient, first + second - alone, rtol=1e-3, atol=1e-4)
    assert plain.keys() < both.keys()


def test_each_has_its_own_phases(scenes):
    recipe = tiny_pair(scenes, schedule=Schedule(steps=100, batch_size=2))
    lgd = dataclasses.replace(recipe.method.lgd, detach_fraction=0.3, final_fraction=0.2, freeze_fraction=0.1)
    icd = dataclasses.replace(recipe.method.icd, detach_fraction=0.01, final_fraction=0.0)
    recipe = dataclasses.replace(recipe, method=LGDICDConfig(lgd, icd), backbone_weights="weights.pth")
    first, middle, last = (phase_at(recipe, step) for step in (0, 50, 99))
    assert first.of("lgd").detach_student and first.of("icd").detach_student and not first.train_backbone
    assert phase_at(recipe, 5).of("lgd").detach_student and not phase_at(recipe, 5).of("icd").detach_student
    assert middle.of("lgd") == middle.of("icd") == Phase()
    assert last.distill and not last.of("lgd").distill and last.of("icd").distill
    assert Phase().of("lgd") == Phase() and phase_at(get_recipe("coco-fcos-icd"), 5000).of("icd") == Phase()


def test_a_part_that_is_over_neither_runs_nor_trains(scenes):
    built = build(tiny_pair(scenes))
    module, batch = built.module, next(iter(build_train_loader(built.train_set, batch_size=2, total_steps=1)))
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    phase = Phase(parts=(("lgd", Phase(distill=False)), ("icd", Phase())))
    assert module.apply_phase(phase, trainable)
    losses = module(batch, phase)
    assert "icd_distill" in losses and not any("lgd" in name or "instructive" in name for name in losses)
    assert not any(p.requires_grad for p in module.distiller["lgd"].parameters())
    assert all(p.requires_grad for p in module.distiller["icd"].parameters())


@pytest.mark.parametrize("own", [False, True])
def test_optimisers(scenes, own):
    recipe = tiny_pair(scenes)
    slow = dataclasses.replace(recipe.optimizer, learning_rate=1e-4) if own else None
    recipe = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, lgd_optimizer=slow))
    icd = get_recipe("scenes-retinanet-icd").method_optimizer
    recipe = dataclasses.replace(recipe, method_optimizer=icd)
    module = build(recipe).module
    found = {o.name: o for o in build_optimizers(recipe, module)}
    assert set(found) == {"student", "method", *(["lgd"] if own else [])}
    assert found["method"].config == icd and all(n.startswith("distiller.icd.") for n in found["method"].parameters)
    owner = found["lgd" if own else "student"]
    assert any(name.startswith("distiller.lgd.") for name in owner.parameters)
    assert any(name.startswith("distiller.lgd.") for name in found["student"].parameters) != own
    owned = [name for optimizer in found.values() for name in optimizer.parameters]
    assert sorted(owned) == sorted(name for name, p in module.named_parameters() if p.requires_grad)


def test_a_run_resumed_is_the_run(scenes, tmp_path, monkeypatch):
    """Both methods through training, checkpoint, resuming and the files; what is left is a plain detector."""
    recipe = tiny_pair(scenes, schedule=Schedule(steps=5, batch_size=2))
    result = train(recipe, tmp_path / "whole", device="cpu", console=silent())
    assert result.metrics["method_parameters"] > 0
    take_step = trainer.Trainer._take_step

    def crash(self, parts):
        if self.step == 4:
            raise RuntimeError("power cut")
        return take_step(self, parts)

    monkeypatch.setattr(trainer.Trainer, "_take_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "again", device="cpu", console=silent())
    monkeypatch.undo()
    train(recipe, tmp_path / "again", resume=True, device="cpu", console=silent())
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "again"))
    detector, _ = load_detector(tmp_path / "whole/student.safetensors")
    assert not any("distiller" in name for name in detector.state_dict())
    parts = {name.split(".")[0] for name in load_file(tmp_path / "whole/method.safetensors")}
    assert parts == {"lgd", "icd"} and (tmp_path / "whole/priors.json").exists()
    assert json.loads((tmp_path / "whole/recipe.json").read_text())["method"]["kind"] == "lgd-icd"


def test_recipes_combine_those_of_lgd_and_icd():
    for detector in ("retinanet", "fcos", "faster-rcnn", "mask-rcnn"):
        for family in ("scenes", "coco"):
            lgd, icd, both = (get_recipe(f"{family}-{detector}-{m}") for m in ("lgd", "icd", "lgdicd"))
            assert (both.method.lgd, both.method.icd) == (lgd.method, icd.method) and both.schedule == lgd.schedule
            assert both.teacher == icd.teacher and both.inherit and both.method_optimizer == icd.method_optimizer
            assert both.method.lgd_optimizer == lgd.method_optimizer
            assert Recipe.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    changed = parse_cli("scenes-retinanet-lgdicd", ["--method.icd.weight", "2", "--method.lgd.heads", "4"])
    assert changed.method.icd.weight == 2 and changed.method.lgd.heads == 4
    with pytest.raises(ValueError, match=r"pair_of: .* must share detector"):
        pair_of(LGDICDConfig, get_recipe("coco-fcos-lgd"), get_recipe("coco-retinanet-icd"), name="pair")
    with pytest.raises(ValueError, match="ICD must have a teacher"):
        dataclasses.replace(both, teacher=None, inherit=False)
    masks = dataclasses.replace(both.method.lgd, use_masks=True)
    with pytest.raises(ValueError, match="must be False for fcos, got True; it loads no masks"):
        dataclasses.replace(get_recipe("coco-fcos-lgdicd"), method=LGDICDConfig(masks, both.method.icd))


def test_a_pair_needs_its_teacher(scenes):
    module = build(tiny_pair(scenes)).module
    with pytest.raises(ValueError, match="teacher must be given for ICD"):
        StepModule(module.detector, module.distiller)
