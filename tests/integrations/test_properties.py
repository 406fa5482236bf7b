"""What holds in every host: precision, memory format, compilation, accumulation, copies, resuming, methods."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from host_cases import HOSTS, students_gradient

from fastkd.distillers import ICD, LGD, PKD
from fastkd.integrations import Teacher
from fastkd.types import ClassPriors


@pytest.fixture(params=HOSTS)
def host(request):
    if request.param == "detectron2":
        request.getfixturevalue("detectron2_modules")
    return HOSTS[request.param]()


METHODS = pytest.mark.parametrize("method", ["icd", "lgd"])


def parameters(kd):
    return [p.detach().clone() for p in kd.distillation.network.parameters()]


def gradients(kd):
    kd.distillation.optimizer.average_gradients()
    return [p.grad.clone() for p in kd.distillation.network.parameters()]


@pytest.mark.sampled
@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(host, method, dtype):
    train_under_autocast(host, method, dtype)


def test_a_grad_scaler_that_skips_a_step():
    """RT-DETR's gradients overflow at this scale, so that the scaler skips the first of its float16 steps."""
    train_under_autocast(HOSTS["transformers"](), "icd", torch.float16)


def train_under_autocast(host, method, dtype):
    """Two steps, in float16 with a GradScaler: all that is trained stays finite, float32 and moves."""
    model, kd = host.attached(method)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=dtype == torch.float16)
    for step in range(2):
        with torch.autocast("cpu", dtype):
            total, own = host.run(model, step)
        assert own and all(value.isfinite() for value in own.values())
        optimizer.zero_grad()
        scaler.scale(total).backward()
        before = parameters(kd)
        scaler.step(optimizer)
        scaler.update()
        kd.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    after = list(kd.distillation.network.parameters())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
    assert any(not torch.equal(p, old) for p, old in zip(after, before, strict=True))


@pytest.mark.sampled
@METHODS
def test_channels_last_gives_the_same_losses(host, method):
    _, expected = host.run(host.attached(method)[0])
    model, _ = host.attached(method)
    total, own = host.run(model.to(memory_format=torch.channels_last))
    total.backward()
    assert set(own) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.sampled
@METHODS
def test_compiled_after_attaching_gives_the_same_losses(host, method):
    _, expected = host.run(host.attached(method)[0])
    model, _ = host.attached(method)
    total, own = host.run(host.compile(model))
    total.backward()
    assert set(own) == set(expected) and students_gradient(model) > 0
    for key, value in expected.items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-4)


def test_accumulation_and_a_grad_scaler_change_nothing(host):
    """Factors of the host's loss (accumulation, gradient scaling) are divided out before clipping."""
    wanted = None
    for scale in (1.0, 1 / 4, 1024.0):
        model, kd = host.attached()
        for _ in range(1 if scale >= 1 else 4):
            kd.distillation.computed = 0  # the same draws for each part
            (scale * host.run(model)[0]).backward()
        found = gradients(kd)
        wanted = found if wanted is None else wanted
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.sampled
@METHODS
def test_copies_between_backward_and_step_do_not_distil(host, method):
    """An EMA by deep copy and a pickled model are plain: they load without fastkd and give the host's losses."""
    model, kd = host.attached(method)
    total, own = host.run(model)
    total.backward()
    pickled = pickle.dumps(model)
    assert b"fastkd" not in pickled
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert host.run(twin.train())[1] == {}
    assert own and copy.deepcopy(kd) is kd and kd.state.computed == 1


def train(host, model, kd, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    for step in steps:
        optimizer.zero_grad()
        host.run(model, step)[0].backward()
        optimizer.step()
        kd.step()


@pytest.mark.sampled
@METHODS
def test_resuming_is_exact(host, method, tmp_path):
    model, kd = host.attached(method, total_steps=4)
    train(host, model, kd, range(4))
    half, half_kd = host.attached(method, total_steps=4)
    train(host, half, half_kd, range(2))
    half_kd.save(tmp_path / "kd.pt")
    again, again_kd = host.attached(method, seed=1, total_steps=4)
    again.load_state_dict(half.state_dict())
    if hasattr(half, "loss_normalizer"):  # detectron2 keeps it out of the state dict
        again.loss_normalizer = half.loss_normalizer
    again_kd.load(tmp_path / "kd.pt")  # before the modules are built
    train(host, again, again_kd, range(2, 4))
    assert again_kd.state.steps == 4
    for mine, theirs in zip(parameters(kd), parameters(again_kd), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [ICD, LGD, PKD])
def test_a_method_object_with_its_own_settings(host, kind):
    n = host.classes
    uniform = ClassPriors(torch.full((n,), 1 / n), torch.full((n, 2), 0.2), torch.full((n, 2), 0.1))
    method = {
        ICD: lambda: ICD(n, uniform, 16, teacher_channels=host.width, heads=2, rho=1),
        LGD: lambda: LGD(n, 16, heads=2, context=False),
        PKD: lambda: PKD(16, teacher_channels=host.width, weight=3.0),
    }[kind]()
    model, kd = host.attached(method)
    total, own = host.run(model)
    total.backward()
    kd.step()
    assert kd.distillation.network.method is method and students_gradient(model) > 0
    assert any(name.startswith(f"{kind.__name__.lower()}_distill") for name in own)


def test_score_weighted_l2(host, request):
    """The teacher's head gives the scores of its cells; a teacher without scores is refused."""
    if "deformable-detr" in request.node.name:
        with pytest.raises(ValueError, match="class scores of the teacher's cells, got a DeformableDetr"):
            host.attached("scorel2")
        return
    model, kd = host.attached("scorel2")
    total, own = host.run(model)
    (value,) = own.values()
    assert next(iter(own)).startswith("scorel2_distill") and 0 < value < torch.inf
    total.backward()
    kd.step()
    norms = kd.distillation.probe.norms[next(iter(kd.distillation.probe.norms))]
    assert all(float(norm) > 0 for norm in norms)


def test_scores_can_be_given(host):
    """A `Teacher` of one's own with `scores`: constant scores give the unweighted L2."""
    features = host.attached("icd")[1].teacher
    given = Teacher(
        features.module, features.features, normalization=features.normalization,
        scores=lambda levels: [level.new_full((len(level), 1, *level.shape[2:]), 0.5) for level in levels],
    )  # fmt: skip
    model = host.model(0)
    kd = host.attach(model, "scorel2", teacher=given, detach_steps=0)
    host.run(model)[0].backward()
    assert kd.state.computed == 1


@pytest.mark.sampled
@METHODS
def test_detach_leaves_the_plain_model(host, method):
    model, kd = host.attached(method)
    host.run(model)
    kd.detach()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    total, own = host.run(model, 1)
    plain = host.model(0)
    host.run(plain)
    assert own == {} and torch.equal(total, host.run(plain, 1)[0])


def test_the_report_knows_whether_the_teacher_finds_the_objects(host, request):
    model, kd = host.attached()
    host.run(model)[0].backward()
    known = not any(name in request.node.name for name in ("detectron2", "mmdetection"))
    assert (f"the teacher finds 0 of the {len(kd.distillation.probe.batch.boxes)}" in kd.report()) == known
    assert ("is unknown: pass Teacher(module, detect=...)" in kd.report()) != known


def test_no_distillation_without_gradients(host):
    model, kd = host.attached()
    with torch.no_grad():
        assert host.run(model)[1] == {}
    assert kd.state.computed == 0


def test_models_that_are_compiled_or_attached_already(host):
    model, _ = host.attached("lgd")
    with pytest.raises(ValueError, match=r"attached already; call its detach\(\) first"):
        host.attach(model, "lgd")
    with pytest.raises(ValueError, match="attach first, then compile"):
        host.attach(torch.compile(host.model(0)), "lgd")
    with pytest.raises(ValueError, match="needs a teacher, got None"):
        host.attach(host.model(0), "icd")


def test_a_teacher_in_train_mode(host, request):
    """It is set to eval mode, with a warning except for a YOLO, whose network is usually in train mode."""
    teacher, silent = host.teacher().train(), "ultralytics" in request.node.name
    warned = pytest.warns(UserWarning, match=r"in train mode.*Call teacher.eval\(\)")
    with contextlib.nullcontext() if silent else warned:
        kd = host.attach(host.model(0), "icd", teacher=teacher)
    assert not any(part.training for part in kd.teacher.module.modules())


def test_detach_gives_the_teacher_back_as_it_was(host):
    model, teacher, whole = host.model(0), host.teacher().half(), host.teacher()
    modes, names, trained = {}, dict(teacher.named_modules()), [p.requires_grad for p in teacher.parameters()]
    for index, (name, part) in enumerate(names.items()):
        modes[name] = part.training = index % 2 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of train mode
        kd = host.attach(model, "icd", teacher=teacher)
    kd.detach()
    assert {name: part.training for name, part in names.items()} == modes
    assert [p.requires_grad for p in teacher.parameters()] == trained
    assert all(p.dtype == torch.float16 for p in teacher.parameters())
    for before, after in zip(whole.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert torch.equal(before.half() if before.is_floating_point() else before, after)


def test_the_report_after_detaching(host, request):
    """It runs a teacher that has its state of before, in eval mode for that time."""
    model, kd = host.attached()
    host.run(model)[0].backward()
    before = kd.report()
    kd.detach()
    kd.teacher.module.train()
    assert kd.report() == before


def test_a_replica_of_data_parallel(host):
    model, _ = host.attached("lgd")
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="not by DataParallel; of the wrappers only DistributedDataParallel"):
        host.run(replica)


def test_a_part_that_is_gone(host):
    """The error of the first batch names part and version; a later one is a warning, and the batch trains alone."""
    model, _ = host.attached()
    host.lose(model)
    with pytest.raises(RuntimeError, match=r"must give a pyramid at .*\((\w+ \d+\.|.* of unknown version)"):
        host.run(model)
    model, kd = host.attached()
    plain = host.model(0)
    for twin in (model, plain):
        host.run(twin)
        host.lose(twin)
    with pytest.warns(UserWarning, match="(?s)this batch trains alone.*must give a pyramid at"):
        total, own = host.run(model, 1)
    assert torch.equal(total, host.run(plain, 1)[0]) and not any(own.values()) and kd.state.failures == 1


def _raise(*args):
    raise RuntimeError("broken")


def test_a_failure_after_the_first_batch_trains_the_host_alone(host):
    model, kd = host.attached()
    host.run(model)
    kd._host_step = _raise
    plain = host.model(0)
    host.run(plain)
    with pytest.warns(UserWarning, match="this batch trains alone"):
        total, own = host.run(model, 1)
    assert torch.equal(total, host.run(plain, 1)[0]) and not any(own.values()) and kd.state.failures == 1
