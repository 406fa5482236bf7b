"""torch.compile of a step: results as in eager mode, few graphs for any box counts, and messages if unavailable."""

import dataclasses
import functools

import distiller_cases
import pytest
import torch
from detector_cases import rectangles, small_config
from ragged import priors, ragged_batch
from safetensors.torch import load_file
from tiny_runs import make_tiny_data, silent, tiny_recipe

from fastkd.detectors import build_detector
from fastkd.distillers import ICD, LGD
from fastkd.ops._support.coverage import full_precision
from fastkd.training import build as building
from fastkd.training import train
from fastkd.training.balance import Balance
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.parallel import compiled
from fastkd.training.schedule import Phase
from fastkd.training.step import FrozenTeacher, Regions, StepModule, sum_losses


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_a_balanced_step_compiled_equals_eager(fresh):
    """The measurement runs two more backward passes through the compiled graphs."""
    detector = build_detector(small_config("retinanet", norm="frozen_bn"))
    distiller, found = LGD(3, 32, heads=4), []
    for regions in (Regions(), Regions(True, "aot_eager")):
        module = StepModule(detector, distiller, None, None, regions, Balance(0.5)).train()
        torch.manual_seed(0)
        with compiled.compiler_settings(regions.enabled, True):
            losses = module(rectangles((3, 2), size=(64, 64), seed=0), Phase())
            sum_losses(losses).backward()
        found.append((losses, module.balance.factor()))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4) and found[0][1] != 1


@pytest.mark.parametrize(("method", "wanted"), [pytest.param("lgd", 3, marks=pytest.mark.long), ("icd", 4)])
def test_compiled_equals_eager_in_few_graphs(fresh, method, wanted):
    detector = build_detector(small_config("retinanet", norm="frozen_bn"))
    teacher = FrozenTeacher(build_detector(small_config("retinanet", width=0.5)), None) if method == "icd" else None
    distiller = LGD(3, 32, heads=4) if method == "lgd" else ICD(3, priors(3), 32, heads=4)
    eager = StepModule(detector, distiller, teacher, None).train()
    quick = StepModule(detector, distiller, teacher, None, Regions(True, "aot_eager")).train()
    assert quick.state_dict().keys() == eager.state_dict().keys()
    parameters = [p for p in eager.parameters() if p.requires_grad]
    for seed, counts in enumerate([(3, 2), (5, 4), (2, 7)]):
        batch, found = rectangles(counts, size=(64, 64), seed=seed), []
        for module in (eager, quick):
            torch.manual_seed(seed)
            losses = module(batch, Phase())
            found.append((losses, torch.autograd.grad(sum_losses(losses), parameters, allow_unused=True)))
        (losses, grads), (compiled_losses, compiled_grads) = found
        torch.testing.assert_close(compiled_losses, losses)
        for ours, theirs in zip(compiled_grads, grads):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(theirs.abs().max())))
        assert graphs() == wanted
    assert quick.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.long
def test_a_run_through_compile_learns_the_same(fresh, tmp_path_factory, tmp_path, monkeypatch):
    data = make_tiny_data(tmp_path_factory)
    monkeypatch.setattr(building, "Regions", functools.partial(Regions, backend="aot_eager"))
    weights = {}
    for on in (False, True):
        runtime = RuntimeConfig(precision="float32", compile=on, log_every=2, checkpoint_every=4, ledger_pairs=1)
        schedule = Schedule(steps=3, batch_size=4, accumulate=2)
        recipe = tiny_recipe(data, method="lgd", runtime=runtime, schedule=schedule)
        assert train(recipe, tmp_path / str(on), device="cpu", console=silent()).status == "finished"
        assert (graphs() > 0) == on
        weights[on] = load_file(tmp_path / str(on) / "student.safetensors")
    assert weights[True].keys() == weights[False].keys()
    for name, theirs in weights[False].items():
        torch.testing.assert_close(weights[True][name], theirs, rtol=1e-3, atol=1e-4)


def test_a_machine_without_compiler_is_refused_before_the_run(tmp_path_factory, tmp_path, monkeypatch):
    recipe = tiny_recipe(make_tiny_data(tmp_path_factory))
    recipe = dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, compile=True))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"compile: a C\+\+ compiler must be installed, got none of .*install g\+\+"):
        train(recipe, tmp_path / "run", device="cpu", console=silent())
    assert not (tmp_path / "run").exists()


def test_options_of_inductor():
    on_gpu, on_cpu = (Regions(True)._options(kind) for kind in ("cuda", "cpu"))
    assert on_gpu == on_cpu | compiled.COMBINED and not on_cpu.keys() & compiled.COMBINED.keys()
    assert torch.compile(torch.sin, options=on_gpu)  # torch knows them all
    assert Regions(True, "aot_eager")._options("cuda") is None
    nested = [torch.nn.ReLU(), [torch.empty(1, device="meta")], torch.empty(1)]
    assert compiled._device_type(nested) == "meta" and compiled._device_type([None]) == "cpu"


def _linear_in_full_precision(module, x):
    with full_precision(x):
        return module(x)


def test_backward_of_float32_parts_stays_float32_under_autocast(fresh):
    """As eager's does, whose backward pass runs outside of autocast; torch.compile would cast it to bfloat16."""
    torch.manual_seed(0)
    module, x, found = torch.nn.Linear(32, 16), torch.randn(64, 32), []
    for regions in (Regions(), Regions(True, "aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = regions("linear", _linear_in_full_precision, module, x)
        found.append(torch.autograd.grad(y.square().mean(), list(module.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [pytest.param("lgd", marks=pytest.mark.long), "icd"])
def test_inductor_takes_any_count_of_boxes(fresh, name):
    """The graphs that "aot_eager" runs as they are, generated, compiled and run: one of each method for all counts."""
    torch.manual_seed(0)
    student, teacher, _ = distiller_cases.inputs([4, 3], levels=((6, 8), (3, 4)))
    module = distiller_cases.build(name)
    step = StepModule(torch.nn.Module(), module, object(), None, Regions(True))
    named = dict(module.named_parameters())
    named.pop("student_adapter.4.bias", None)  # InstanceNorm takes it away again: its gradient is rounding
    parameters = [p for p in named.values() if p.requires_grad]
    # The detector's loss on the instructive pyramid. With this draw eager's own gradients in bfloat16 are within 6 % of
    # float32's; other draws put ReLUs so close to 0 that rounding alone moves a weight's gradient by 15 %.
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(level.shape, generator=draw) for level in student]
    for counts in ([4, 3], [2, 6]):
        batch, found = ragged_batch(counts), []
        for enabled in (False, True):
            step.regions.enabled = enabled
            levels = [level.detach().clone().requires_grad_() for level in student]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = step.distill_by(module, levels, batch, Phase(), lambda: teacher)
            total = sum_losses(made.losses) + sum((a * b).mean() for a, b in zip(made.instructive or (), weights))
            found.append((made.losses, torch.autograd.grad(total, [*levels, *parameters])))
        (losses, grads), (compiled_losses, compiled_grads) = found
        torch.testing.assert_close(
            (compiled_losses, compiled_grads[: len(student)]), (losses, grads[: len(student)]), rtol=0.05, atol=0.01
        )
        assert len(grads) > len(student) + 4
        for ours, theirs in zip(compiled_grads, grads):
            assert (ours - theirs).norm() <= 0.1 * theirs.norm() + 1e-6
    assert graphs() == 1
