"""Weights that balance themselves (methods 10): the ratio of the gradients, measurements, checkpoints, errors."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_recipe

from fastkd.data import build_train_loader
from fastkd.training import DistillConfig, LGDConfig, Recipe, get_recipe, train
from fastkd.training.balance import DECAY, Balance
from fastkd.training.build import build
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.schedule import Phase

CASES = [
    ("retinanet", "lgd"),
    ("fcos", "fgfi"),
    ("faster-rcnn", "icd"),
    ("retinanet", "pkd"),
    ("retinanet", "cwd"),
    ("fcos", "scorel2"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def built_with(data, kind, method, **settings):
    """The built recipe, and a batch with objects."""
    built = build(tiny_recipe(data, kind, method, distill=DistillConfig(**settings)))
    options = {"short_sides": (64,), "max_side": 96}
    (batch,) = build_train_loader(built.train_set, batch_size=4, total_steps=1, **options)
    assert sum(batch.counts) > 0
    return built, batch


def losses_and_pyramid(module, batch, seed=0):
    """The losses of a step, with the pyramid from which they were computed."""
    features, kept = module.detector.features, []
    module.detector.features = lambda images: kept.append(features(images)) or kept[-1]
    torch.manual_seed(seed)
    losses = module(batch, Phase())
    del module.detector.features
    return losses, kept[0]


def norm(losses, pyramid):
    """Norm of the gradient of a sum of losses at the pyramid."""
    levels = torch.autograd.grad(sum(losses), pyramid, retain_graph=True, allow_unused=True)
    return torch.cat([level.flatten() for level in levels if level is not None]).double().norm().item()


def norms(module, losses, pyramid):
    """Norms of the gradients of the detector's losses and of the method's, without the instructive ones."""
    own = [losses[name] for name in module.detector_losses]
    rest = [v for n, v in losses.items() if n not in module.detector_losses and not n.startswith("instructive_")]
    return norm(own, pyramid), norm(rest, pyramid)


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("weight", [None, 1e3])
def test_the_ratio_is_exact_whatever_the_weight(data, kind, method, weight):
    built, batch = built_with(data, kind, method, balance=0.25)
    module = built.module.train()
    if weight is not None:
        module.distiller.weight = weight
    losses, pyramid = losses_and_pyramid(module, batch)
    detector, taught = norms(module, losses, pyramid)
    assert taught / detector == pytest.approx(0.25, rel=1e-4)
    assert module.balance.report()["balance"]["ratio"] == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_only_losses_that_reach_the_pyramid_are_scaled(data, kind, method):
    built, batch = built_with(data, kind, method, balance=0.25)
    module = built.module.train()
    balanced, _ = losses_and_pyramid(module, batch)
    factor, reaching = module.balance.factor(), module.balance.estimates[""].losses
    module.balance = Balance()
    plain, _ = losses_and_pyramid(module, batch)
    assert balanced.keys() == plain.keys() and factor != 1 and len(reaching) == 1
    for name, value in plain.items():
        assert torch.equal(balanced[name], factor * value if name in reaching else value), name


def test_off_measures_nothing_and_changes_no_loss(data, monkeypatch):
    """Off, the losses are those of detector and method, to the bit."""
    built, batch = built_with(data, "retinanet", "cwd")
    module = built.module.train()
    monkeypatch.setattr(torch.autograd, "grad", None)
    losses, pyramid = losses_and_pyramid(module, batch)
    expected = {**module.detector.loss(pyramid, batch), **module.distill(pyramid, batch, Phase())}
    assert losses.keys() == expected.keys() and module.balance.report() == {}
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_methods_of_a_combination_are_balanced_one_by_one(data):
    built, batch = built_with(data, "retinanet", "lgdicd", balance=0.5)
    module = built.module.train()
    losses, pyramid = losses_and_pyramid(module, batch)
    detector = norm([losses[name] for name in module.detector_losses], pyramid)
    for part, name in (("lgd", "lgd_distill"), ("icd", "icd_distill")):
        assert name in module.balance.estimates[part].losses
        assert norm([losses[name]], pyramid) / detector == pytest.approx(0.5, rel=1e-4)
    assert module.balance.report()["balance"].keys() == {"lgd", "icd"}


def test_running_means_over_the_measured_steps():
    """Two measurements by hand: the losses are linear, so that their gradients are their factors."""
    pyramid, balance = [torch.ones(1, 1, 2, 2, requires_grad=True)], Balance(0.5, every=3)
    level, found = pyramid[0] * 1.0, []
    for step, (detector, method) in enumerate([(4.0, 2.0), (9.0, 9.0), (9.0, 9.0), (8.0, 1.0)]):
        balance.begin(step, torch.clone)
        for _ in range(2):  # micro-batches: the second is not measured
            made = balance.scaled("", {"teach": method * level.sum()}, {"cls": detector * level.sum()}, [level])
            found.append((made["teach"] / (method * level.sum())).item())
    last = 0.5 * (DECAY * 4 + (1 - DECAY) * 8) / (DECAY * 2 + (1 - DECAY) * 1)
    assert found == pytest.approx([1.0] * 6 + [last] * 2)
    assert balance.report()["balance"] == pytest.approx({"factor": last, "ratio": last * 1 / 8})


def test_a_method_without_a_gradient_is_measured_in_the_next_step():
    level = torch.ones(1, 1, 2, 2, requires_grad=True) * 1.0
    balance = Balance(0.5, every=100)
    for step, method in enumerate([0.0, 2.0]):
        balance.begin(step, torch.clone)
        made = balance.scaled("", {"teach": method * level.sum()}, {"cls": level.sum()}, [level])
    assert made["teach"].item() == pytest.approx(0.25 * 8)


def test_the_mean_over_processes_is_of_squares():
    level = torch.ones(1, 1, 2, 2, requires_grad=True) * 1.0
    balance = Balance(1.0)
    balance.begin(0, lambda squares: squares * torch.tensor([4.0, 9.0], dtype=torch.float64))
    balance.scaled("", {"teach": level.sum()}, {"cls": level.sum()}, [level])
    assert balance.factor() == pytest.approx(2 / 3)


def test_a_run_logs_the_balance_and_resumes_bit_for_bit(data, tmp_path):
    """Balancing begins with the first step that is not detached; a resumed run takes the estimate along."""
    recipe = dataclasses.replace(
        tiny_recipe(data, method="lgd"),
        method=LGDConfig(detach_fraction=0.25, freeze_fraction=0.0),
        distill=DistillConfig(balance=0.5, balance_every=3),
        schedule=Schedule(steps=8, batch_size=2),
        runtime=RuntimeConfig(precision="float32", log_every=2, checkpoint_every=4, ledger_pairs=0),
    )
    train(recipe, tmp_path / "whole", device="cpu", console=silent())
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for name in ("checkpoints/step_0000008", "metrics.json"):
        path = tmp_path / "halves" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(recipe, tmp_path / "halves", device="cpu", console=silent(), resume=True)
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "halves"))
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert "balance" not in lines[0] and lines[1]["balance"]["factor"] > 0
    assert lines[1]["balance"] != lines[3]["balance"]


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_ratios(ratio):
    with pytest.raises(ValueError, match="DistillConfig: balance must be positive and finite, or None, got"):
        DistillConfig(balance=ratio)


def test_bad_settings_and_earlier_recipes():
    with pytest.raises(ValueError, match="balance_every must be at least 1, got 0"):
        DistillConfig(balance_every=0)
    baseline = get_recipe("scenes-retinanet-baseline")
    with pytest.raises(ValueError, match=r"distill.balance must be None without a method, got 0.5; leave it out"):
        dataclasses.replace(baseline, distill=DistillConfig(balance=0.5))
    earlier = {name: value for name, value in baseline.to_dict().items() if name != "distill"}
    assert Recipe.from_dict(earlier) == baseline
