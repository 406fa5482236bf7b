"""The trainer: output and errors of a run, trained modules per phase, and training of every method."""

import dataclasses
import io
import json
import os
import signal

import pytest
import torch
from draws import few, some
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import KINDS, make_tiny_data, silent, tiny_detector, tiny_recipe

from fastkd.data import build_train_loader
from fastkd.detectors import build_detector, load_detector, save_detector
from fastkd.ops._support import dispatch
from fastkd.training import NonFiniteLossError, Recipe, step, sum_losses, train, trainer
from fastkd.training.build import build, open_data
from fastkd.training.config import OptimizerConfig, RuntimeConfig, Schedule
from fastkd.training.methods import FGFIConfig, LGDConfig
from fastkd.training.optimizers import NamedOptimizer, build_optimizers
from fastkd.training.run import loading
from fastkd.training.run.directory import RunDirectoryError
from fastkd.training.run.logging import RunLog
from fastkd.training.schedule import Phase, phase_at

METHODS = ("baseline", "inherit", "lgd", "icd", "fgfi")
FLOAT = RuntimeConfig(precision="float32", log_every=2, checkpoint_every=4, ledger_pairs=0)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def first_batch(built, batch_size=4):
    data = built.recipe.data
    loader = build_train_loader(
        built.train_set, batch_size=batch_size, total_steps=1, short_sides=data.short_sides, max_side=data.max_side
    )
    return next(iter(loader))


@pytest.mark.parametrize("method", ["baseline", "icd"])
def test_what_a_run_leaves(tiny_data, tmp_path, method):
    recipe = tiny_recipe(tiny_data, method=method, runtime=dataclasses.replace(FLOAT, eval_every=4, ledger_pairs=1))
    console = silent()
    result = train(recipe, tmp_path / "run", device="cpu", console=console, command="the command")
    run = tmp_path / "run"
    assert (result.status, result.exit_code) == ("finished", 0)
    assert Recipe.from_dict(json.loads((run / "recipe.json").read_text())) == recipe
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_0000004", "step_0000006"]
    assert list((run / "tensorboard").iterdir())

    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6]
    assert "AP" in lines[2]["bbox"] and lines[0]["loss"] == pytest.approx(sum(lines[0]["losses"].values()), rel=1e-5)
    assert {"lr", "grad_norm", "images_per_second", "loader_images_per_second"} <= lines[0].keys()
    first = lines[0]
    assert 0 < first["data_seconds"] == pytest.approx(first["data_wait"] * first["seconds_per_step"])
    assert set(lines[0]["lr"]) == ({"student", "method"} if method == "icd" else {"student"})

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert {"bbox", "steps", "seed", "seconds", "commit", "torch", "data"} <= metrics.keys()
    assert metrics["loading"]["data_wait"] < 1 and metrics["loading"].keys() < first.keys()
    assert metrics["command"] == "the command" and metrics["steps"] == 6 and len(metrics["bbox"]["per_class"]) == 10
    assert isinstance(json.loads((run / "detections.json").read_text()), list)
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["student"]["seconds_per_step"] > 0
    assert "Cost of" in console.file.getvalue() and "step 6/6" in console.file.getvalue()
    assert f"images/s (loader {first['loader_images_per_second']:.1f}, waits " in console.file.getvalue()

    student, names = load_detector(run / "student.safetensors")
    plain = build_detector(recipe.detector).state_dict()
    assert {k: v.shape for k, v in student.state_dict().items()} == {k: v.shape for k, v in plain.items()}
    assert names == open_data(recipe)[0].class_names
    assert (run / "method.safetensors").exists() == (run / "priors.json").exists() == (method == "icd")
    if method == "icd":
        assert metrics["inherited"].split()[1] == "of"
        assert load_file(run / "method.safetensors").keys() == build(recipe).module.distiller.state_dict().keys()


PAIRS = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) != ("solov2", "fgfi")]


@pytest.mark.parametrize(("kind", "method"), some(PAIRS, lambda pair: pair, "pairs"))
def test_the_loss_falls(tiny_data, kind, method):
    gentle = OptimizerConfig(learning_rate=0.005, clip_norm=10.0)
    recipe = tiny_recipe(tiny_data, kind, method, optimizer=gentle)
    built = build(recipe)
    module, batch = built.module.train(), first_batch(built)
    optimizers = build_optimizers(recipe, module)
    totals = []
    for _ in range(8):
        torch.manual_seed(0)
        losses = module(batch, Phase(distill=recipe.method is not None))
        for name, value in losses.items():
            assert value.ndim == 0 and torch.isfinite(value), name
        totals.append(sum_losses(losses))
        totals[-1].backward()
        missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        for optimizer in optimizers:
            optimizer.set_rate(50, 100)
            optimizer.step()
    assert totals[-1] < 0.95 * totals[0]


@pytest.mark.parametrize("method", few(METHODS))
def test_a_whole_run_in_bfloat16_with_workers(tiny_data, tmp_path, method):
    runtime = dataclasses.replace(FLOAT, precision="bfloat16", channels_last=True)
    schedule = Schedule(steps=3, batch_size=4, accumulate=2)
    recipe = tiny_recipe(tiny_data, method=method, runtime=runtime, schedule=schedule)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    assert train(recipe, tmp_path / "run", device="cpu", console=silent()).status == "finished"
    assert all(t.dtype != torch.bfloat16 for t in load_file(tmp_path / "run" / "student.safetensors").values())


@pytest.mark.parametrize("method", ["icd", "fgfi"])
def test_the_teacher_is_frozen_and_nobodys(tiny_data, tmp_path, method):
    recipe = tiny_recipe(tiny_data, method=method)
    teacher_path = tmp_path / "teacher.safetensors"
    torch.manual_seed(5)
    wide = build_detector(tiny_detector("retinanet", channels=64))
    save_detector(wide, teacher_path, open_data(recipe)[0].class_names)
    built = build(dataclasses.replace(recipe, teacher=str(teacher_path), inherit=False))
    module, teacher = built.module.train(), built.module.teacher.detector
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizers = build_optimizers(recipe, module)
    for _ in range(2):
        sum_losses(module(first_batch(built), Phase())).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    own = {id(p) for p in module.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    assert not any("teacher" in name for name in module.state_dict())
    stored = {id(p) for optimizer in optimizers for p in optimizer.parameters.values()}
    assert stored == own


def test_two_optimisers_share_out_the_parameters(tiny_data):
    recipe = tiny_recipe(tiny_data, method="icd")
    module = build(recipe).module
    student, method = build_optimizers(recipe, module)
    assert all(name.startswith("detector.") for name in student.parameters)
    assert all(name.startswith("distiller.") for name in method.parameters)
    assert len(student.parameters) + len(method.parameters) == len(list(module.parameters()))
    assert isinstance(student.optimizer, torch.optim.SGD) and isinstance(method.optimizer, torch.optim.AdamW)
    lgd = tiny_recipe(tiny_data, method="lgd")
    (only,) = build_optimizers(lgd, build(lgd).module)
    assert any(name.startswith("distiller.") for name in only.parameters)


def test_no_decay_on_norms_and_biases(tiny_data):
    for decays in (False, True):
        recipe = tiny_recipe(tiny_data, optimizer=OptimizerConfig(weight_decay=0.5, decay_norm_and_bias=decays))
        (optimizer,) = build_optimizers(recipe, build(recipe).module)
        decay = {id(p): group["weight_decay"] for group in optimizer.optimizer.param_groups for p in group["params"]}
        for name, parameter in optimizer.parameters.items():
            assert decay[id(parameter)] == (0.5 if decays or parameter.ndim > 1 else 0.0), name


def test_clipping_is_by_the_norm_of_one_optimiser():
    weight, bias = torch.nn.Parameter(torch.zeros(3, 1)), torch.nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = NamedOptimizer("student", config, {"weight": weight, "bias": bias})
    weight.grad, bias.grad = torch.tensor([[3.0], [0.0], [0.0]]), torch.tensor([4.0])
    assert optimizer.step().item() == pytest.approx(5.0)
    assert weight[0].item() == pytest.approx(-0.6, rel=1e-4) and bias.item() == pytest.approx(-0.8, rel=1e-4)
    assert weight.grad is None


def test_frozen_backbone_and_final_phases(tiny_data):
    recipe = tiny_recipe(tiny_data, method="lgd")
    built = build(recipe)
    module, batch = built.module, first_batch(built)
    trainable = frozenset(name for name, _ in module.named_parameters() if "layer1" not in name)
    optimizers = build_optimizers(recipe, module)

    def step_in(phase):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        module.apply_phase(phase, trainable)
        sum_losses(module(batch, phase)).backward()
        for optimizer in optimizers:
            optimizer.set_rate(50, 100)
            optimizer.step()
        return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}

    changed = step_in(Phase(train_backbone=False))
    assert not any(name.startswith("detector.backbone.") for name in changed)  # batch statistics neither
    assert any(name.startswith("detector.neck.") for name in changed)
    assert any(name.startswith("distiller.") for name in changed)
    changed = step_in(Phase())
    assert any(name.startswith("detector.backbone.") and name.endswith("weight") for name in changed)
    assert not any("layer1" in name and name.endswith(".weight") for name in changed)
    changed = step_in(Phase(distill=False))
    assert any(name.startswith("detector.") for name in changed)
    assert not any(name.startswith("distiller.") for name in changed)
    assert module.apply_phase(Phase(), trainable) and not module.apply_phase(Phase(), trainable)


def test_detached_student_learns_from_its_own_loss_alone(tiny_data):
    built = build(tiny_recipe(tiny_data, method="icd", runtime=FLOAT))
    module, batch = built.module.eval(), first_batch(built)

    def gradients(phase):
        module.zero_grad()
        sum_losses(module(batch, phase)).backward()
        return [p.grad.clone() for p in module.detector.parameters()]

    plain = gradients(Phase(distill=False))
    assert all(torch.equal(one, two) for one, two in zip(plain, gradients(Phase(detach_student=True))))
    assert any(not torch.equal(one, two) for one, two in zip(plain, gradients(Phase())))


def test_the_instructive_weight_is_that_of_the_head_s_second_loss(tiny_data):
    losses = {}
    for weight in (1.0, 0.25):
        method = LGDConfig(instructive_weight=weight)
        built = build(dataclasses.replace(tiny_recipe(tiny_data, method="lgd", runtime=FLOAT), method=method))
        losses[weight] = built.module.eval()(first_batch(built), Phase())
    for name, value in losses[1.0].items():
        factor = 0.25 if name.startswith("instructive_") else 1.0
        torch.testing.assert_close(losses[0.25][name], factor * value)
    assert {"instructive_classification", "instructive_box_regression"} <= losses[1.0].keys()


def test_accumulated_gradients_are_the_mean_of_the_parts(tiny_data, tmp_path):
    plain = OptimizerConfig(learning_rate=0.5, momentum=0.0, weight_decay=0.0, warmup=0.0, milestones=())
    detector = tiny_detector("retinanet", norm="frozen_bn")
    recipe = tiny_recipe(
        tiny_data, detector=detector, optimizer=plain, schedule=Schedule(steps=1, batch_size=6, accumulate=3)
    )
    built = build(recipe)
    loader = build_train_loader(
        built.train_set, batch_size=2, total_steps=3, seed=0, short_sides=recipe.data.short_sides,
        max_side=recipe.data.max_side, divisor=32,
    )  # fmt: skip
    for batch in loader:
        (sum_losses(built.module(batch, Phase(distill=False))) / 3).backward()
    train(recipe, tmp_path / "run", device="cpu", console=silent())
    trained = load_file(tmp_path / "run" / "student.safetensors")
    for name, parameter in built.module.detector.named_parameters():
        torch.testing.assert_close(trained[name], (parameter - 0.5 * parameter.grad).detach(), rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_data, runtime=dataclasses.replace(FLOAT, checkpoint_every=1))
    original, calls, ids = step.StepModule.forward, [], []

    def poisoned(self, batch, phase):
        losses = original(self, batch, phase)
        calls.append(1)
        if len(calls) == 3:
            ids.extend(batch.image_ids)
            losses["box_regression"] = losses["box_regression"] * float("nan")
        return losses

    monkeypatch.setattr(step.StepModule, "forward", poisoned)
    with pytest.raises(NonFiniteLossError) as error:
        train(recipe, tmp_path / "run", device="cpu", console=silent())
    message = str(error.value)
    assert "step 3" in message and "['box_regression']" in message and all(str(i) in message for i in ids)
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step_0000001", "step_0000002"]


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_data, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_data, runtime=dataclasses.replace(FLOAT, checkpoint_every=2))
    original, ids = step.StepModule.forward, []

    def poisoned(self, batch, phase):
        losses = original(self, batch, phase)
        ids.append(batch.image_ids)
        if len(ids) == 3:
            losses["box_regression"].register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(step.StepModule, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"gradients must be finite.*at step 3") as error:
        train(recipe, tmp_path / "run", device="cpu", console=silent())
    assert str(ids[2]) in str(error.value)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000002"]


def test_progress_on_a_terminal(tiny_data, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    recipe = tiny_recipe(tiny_data, runtime=dataclasses.replace(FLOAT, eval_every=3))
    train(recipe, tmp_path / "run", device="cpu", console=console)
    text = console.file.getvalue()
    assert "6/6" in text and "images/s" in text and "loss " in text and "left" in text and "finished" in text


def test_the_log_is_json_whatever_is_logged(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.0, "grad_norm": {"student": float("inf")}})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # a crash in the middle of a line
    log = RunLog(tmp_path, 2)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0, "grad_norm": {"student": None}}, {"step": 3, "loss": 1.0}]


def test_options_reach_the_loader_and_torch(tiny_data, tmp_path, monkeypatch):
    given = {}

    def spy(dataset, **options):
        given.update(options, strict=dataset.strict)
        return build_train_loader(dataset, **options)

    monkeypatch.setattr(loading, "build_train_loader", spy)
    recipe = tiny_recipe(tiny_data, seed=3, schedule=Schedule(steps=2, batch_size=4, accumulate=2))
    odd = {"flip": False, "divisor": 64, "aspect_grouping": False, "strict": True, "max_side": 90, "prefetch": 3}
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **odd))
    train(recipe, tmp_path / "run", device="cpu", console=silent())
    wanted = {**odd, "flip": 0.0, "seed": 3, "batch_size": 2, "total_steps": 4, "short_sides": (48, 64)}
    assert {name: given[name] for name in wanted} == wanted

    torch.use_deterministic_algorithms(False)
    for asked in (True, False):
        chosen = dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, deterministic=asked))
        with trainer._settings(chosen):
            assert torch.are_deterministic_algorithms_enabled() == asked
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_on_the_reference_ops_says_so_in_its_recipe(tiny_data, tmp_path, monkeypatch):
    taken = set()
    compiled = dispatch.Dispatch.compiled
    monkeypatch.setattr(dispatch.Dispatch, "compiled", lambda s, t: taken.add(compiled(s, t)) or compiled(s, t))
    for backend in ("reference", "compiled"):
        runtime = dataclasses.replace(FLOAT, ops=backend)
        recipe = tiny_recipe(tiny_data, method="lgd", runtime=runtime, schedule=Schedule(steps=2, batch_size=2))
        taken.clear()
        train(recipe, tmp_path / backend, device="cpu", console=silent())
        assert json.loads((tmp_path / backend / "recipe.json").read_text())["runtime"]["ops"] == backend
        assert taken == {backend == "compiled"}


def test_a_run_directory_must_be_new_or_resumed(tiny_data, tmp_path):
    recipe, run = tiny_recipe(tiny_data, schedule=Schedule(steps=2, batch_size=2)), tmp_path / "run"
    run.mkdir()  # an empty folder is as good as none
    assert train(recipe, run, device="cpu", console=silent(), resume=True).status == "finished"
    with pytest.raises(RunDirectoryError, match=r"must be new or empty.*--resume"):
        train(recipe, run, device="cpu", console=silent())
    content = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    again = train(recipe, run, device="cpu", console=silent(), resume=True)
    assert again.status == "already finished" and again.exit_code == 0 and again.metrics["bbox"]
    other = dataclasses.replace(recipe, seed=4, data=dataclasses.replace(recipe.data, max_side=100, workers=1))
    for finished in (True, False):
        if not finished:
            (run / "metrics.json").unlink()
        with pytest.raises(RunDirectoryError, match=r"data.max_side: 96 there, 100 now, seed: 0 there, 4 now"):
            train(other, run, device="cpu", console=silent(), resume=True)
    assert all(p.read_bytes() == old for p, old in content.items() if p.name != "metrics.json")
    faster = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    assert train(faster, run, device="cpu", console=silent(), resume=True).status == "finished"

    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="must be a folder"):
        train(recipe, tmp_path / "file", device="cpu", console=silent())
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"recipe.json"):
        train(recipe, tmp_path / "else", device="cpu", console=silent(), resume=True)


def test_methods_are_on_when_their_phase_says_so(tiny_data, tmp_path):
    method = FGFIConfig(warmup_fraction=0.34, final_fraction=0.34)
    recipe = tiny_recipe(tiny_data, method="fgfi", runtime=dataclasses.replace(FLOAT, log_every=1))
    recipe = dataclasses.replace(recipe, method=method)
    assert [phase_at(recipe, s).distill for s in range(6)] == [False, False, True, True, False, False]
    train(recipe, tmp_path / "run", device="cpu", console=silent())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["fgfi_imitation" in line["losses"] for line in lines] == [False, False, True, True, False, False]


@pytest.mark.parametrize("kind", ["poto", "solov2"])
def test_a_whole_run_of_detectors_without_suppression_or_boxes(tiny_data, tmp_path, kind):
    """SOLOv2's box AP is that of the boxes around its masks."""
    recipe = tiny_recipe(tiny_data, kind, schedule=Schedule(steps=2, batch_size=2))
    recipe = dataclasses.replace(recipe, detector=tiny_detector(kind, score_threshold=0.001))
    result = train(recipe, tmp_path / "run", device="cpu", console=silent())
    assert result.status == "finished" and result.metrics["bbox"]["AP"] is not None
    assert ("segm" in result.metrics) == (kind == "solov2")
    found = json.loads((tmp_path / "run/detections.json").read_text())
    assert found and all(("segmentation" in entry) == (kind == "solov2") for entry in found)


def test_a_signal_before_the_first_step_leaves_nothing(tiny_data, tmp_path, monkeypatch):
    def slow(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal must end this")

    monkeypatch.setattr("fastkd.training.build.build_detector", slow)
    result = train(tiny_recipe(tiny_data), tmp_path / "run", device="cpu", console=silent())
    assert (result.status, result.exit_code) == ("interrupted", 143) and not (tmp_path / "run").exists()
