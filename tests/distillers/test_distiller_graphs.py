"""A distiller's forward does not synchronise and is one graph for torch.compile and torch.export."""

import dataclasses

import pytest
import torch
from distiller_cases import NAMES, build, inputs, losses
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.types import Batch

# error of a fake tensor when Python reads a value or a data-dependent shape
ASKED = (DataDependentOutputException, DynamicOutputShapeException)


class NoBlockingCopy(TorchDispatchMode):
    """Raises for copies that synchronise: every copy off the device, and blocking ones onto it.

    Fake tensors themselves raise for .item(), nonzero and other reads of values.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if function is torch.ops.aten._to_copy.default else args[1]
            free = result.device.type != "cpu" and (kwargs.get("non_blocking") or args[2:] == (True,))
            if source.device != result.device and not free:
                raise RuntimeError(f"a copy from {source.device} to {result.device} makes the host wait")
        return result


def on_device(value):
    """A fake CUDA tensor like value, or the same for every tensor in a list or a batch."""
    if isinstance(value, list):
        return [on_device(item) for item in value]
    if dataclasses.is_dataclass(value):
        moved = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(
            **{k: v if k in ("counts", "seeds", "image_ids") else on_device(v) for k, v in moved.items()}
        )
    if not isinstance(value, torch.Tensor):
        return value
    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=value.requires_grad)
    return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake


def forward_on_fake_device(name, change=lambda module: None):
    """The losses of a distiller whose tensors are all fake CUDA tensors."""
    student, teacher, batch = inputs()
    module = build(name)
    change(module)
    with FakeTensorMode():
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                held.update({key: on_device(value) for key, value in held.items()})
        arguments = [on_device(value) for value in (student, teacher, batch)]
        with NoBlockingCopy():
            return losses(name, module, *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_forward_never_waits_for_the_device(name):
    found = forward_on_fake_device(name)
    assert found and all(value.device.type == "cuda" and value.requires_grad for value in found.values())


PLANTED = {
    "item": (lambda x: x.sum().item(), ASKED),
    "if": (lambda x: x if (x > 0).any() else -x, ASKED),
    "list": (lambda x: x.tolist(), ASKED),
    "selection": (lambda x: x[x > 0], ASKED),
    "copy to the host": (lambda x: x.cpu(), RuntimeError),
    "blocking copy to the device": (lambda x: x + torch.ones(3, device="cpu").to("cuda").sum(), RuntimeError),
    "blocking copy_": (lambda x: torch.empty(3, device="cuda").copy_(torch.ones(3, device="cpu")), RuntimeError),
}


@pytest.mark.parametrize("sync, error", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_wait_is_noticed(sync, error):
    def plant(module):
        module.adapter.register_forward_hook(lambda module, args, result: sync(result) and None)

    with pytest.raises(error):
        forward_on_fake_device("fgfi", plant)


class OfTensors(torch.nn.Module):
    """A distiller with the batch as tensors and fixed Python numbers, for torch.export."""

    def __init__(self, name, module, batch):
        super().__init__()
        self.name, self.module, self.batch = name, module, batch

    def forward(self, student, teacher, images, image_sizes, boxes, labels, image_index, masks):
        batch = Batch(images, image_sizes, boxes, labels, image_index, self.batch.counts, masks, seeds=self.batch.seeds)
        return losses(self.name, self.module, student, teacher, batch)


def tensors_of(batch):
    return batch.images, batch.image_sizes, batch.boxes, batch.labels, batch.image_index, batch.masks


MASKS_LATER = [pytest.param(name, marks=[pytest.mark.long] if name == "lgd masks" else []) for name in NAMES]


@pytest.mark.parametrize("name", MASKS_LATER)
def test_one_graph_for_compile_and_export(name):
    student, teacher, batch = inputs()
    module = build(name)
    expected = losses(name, module, student, teacher, batch)
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(name, module, student, teacher, batch)
    torch.testing.assert_close(compiled, expected)
    gradients = [torch.autograd.grad(sum(found.values()), student) for found in (compiled, expected)]
    torch.testing.assert_close(*gradients)

    wrapped = OfTensors(name, module, batch)
    arguments = ([level.detach() for level in student], teacher, *tensors_of(batch))
    exported = torch.export.export(wrapped, arguments).module()
    torch.testing.assert_close(exported(*arguments), expected)
    other = inputs(seed=5)[2]  # as many boxes elsewhere
    moved = (*arguments[:2], *tensors_of(other))
    torch.testing.assert_close(exported(*moved), losses(name, module, student, teacher, other))


def test_compiled_noise_follows_the_batchs_seeds():
    student, teacher, batch = inputs()
    module = build("icd")
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    seen = set()
    for seeds in ([1, 2, 3], [4, 5, 6], [1, 2, 3], [2**62, 8, 9]):
        drawn = dataclasses.replace(batch, seeds=seeds)
        found = compiled("icd", module, student, teacher, drawn)
        torch.testing.assert_close(found, losses("icd", module, student, teacher, drawn))
        seen.add(found["icd_distill"].item())
    assert len(seen) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the second makes the seeds free


def test_the_noise_is_an_op_like_any_other():
    torch.library.opcheck(torch.ops.fastkd.seeded_noise.default, ([3, 4], [2, 0], 3))
    first, second = (torch.ops.fastkd.seeded_noise([3, seed], [2, 5], 5) for seed in (4, 5))
    assert first.shape == (2, 5, 7) and torch.isfinite(first).all()
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert first[1, :, 5:].abs().max() <= 2 and 0 <= first[1, :, :5].min() <= first[1, :, :5].max() < 1
    assert not first[0, 2:].any()  # padding
