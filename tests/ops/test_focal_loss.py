"""focal_loss: torchvision's sigmoid focal loss on one-hot targets, with every instruction set and in every dtype."""

import pytest
import torch
from kernels import (
    DTYPES,
    check,
    close_to_float64,
    convert,
)
from torchvision.ops import sigmoid_focal_loss

from fastkd.ops import use_backend
from fastkd.ops.focal_loss import focal_loss, focal_loss_reference


def arguments(shape=(2, 2, 9, 5), positives=4, dtype=torch.float32, scale=4.0):
    """Logits [..., B, A, C], weights [B, A] and so many positive entries, no two of them equal."""
    *_, images, anchors, classes = shape
    logits = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    places = torch.randperm(images * anchors * classes)[:positives]
    image, anchor, label = places // (anchors * classes), places // classes % anchors, places % classes
    weight = torch.rand(images, anchors) * (torch.rand(images, anchors) < 0.8)
    return [logits, weight.double() if dtype == torch.float64 else weight, image, anchor, label]


def by_torchvision(logits, weight, image, anchor, label):
    one_hot = torch.zeros_like(logits)
    one_hot[..., image, anchor, label] = 1
    return (sigmoid_focal_loss(logits, one_hot) * weight[..., None]).flatten(-3).sum(-1)


def draw(choose):
    lead = choose.choice([(), (1,), (2,), (3,)])
    shape = (*lead, choose.randint(1, 2), choose.randint(1, 40), choose.choice([1, 2, 3, 10, 16, 80]))
    most = shape[-1] * shape[-2] * shape[-3]
    made = arguments(shape, min(most, choose.choice([0, 1, 7])), choose.choice(DTYPES), choose.choice([0.1, 3.0, 20.0]))
    if choose.random() < 0.3:
        made[0] = made[0].detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 300, 80), (2, 1, 700, 3), (1, 40, 1), (2, 1, 3, 1100)], ids=str)
def test_no_worse_than_plain(capability, shape, dtype):
    call = arguments(shape, 11, dtype)
    check(focal_loss, focal_loss_reference, call)
    call = convert(arguments(shape, 0), dtype)
    check(focal_loss, focal_loss_reference, [call[0], call[1].float(), *call[2:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beyond_the_caches(capability, dtype):
    check(focal_loss, focal_loss_reference, arguments((2, 1, 10001, 80), 30, dtype))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_is_torchvisions(capability, backend):
    with use_backend(backend):
        close_to_float64(focal_loss, by_torchvision, arguments((2, 2, 30, 7), 9, torch.float64))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_extreme_logits(capability, backend):
    call = arguments((2, 5, 4))
    extreme = torch.tensor([-90.0, -30, -5, 0, 5, 30, 90, 1, -1e4, 1e4]).repeat(4).view(2, 5, 4)
    call[0] = extreme.requires_grad_()
    call[2:] = [torch.tensor(index) for index in ([0, 0, 0, 1, 1], [0, 1, 2, 0, 3], [0, 3, 1, 2, 1])]
    with use_backend(backend):
        ours, theirs = focal_loss(*call), by_torchvision(*call)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x, call[0])[0] for x in (ours, theirs)))


def test_nan_and_infinity_show(capability):
    for value, wanted in ((torch.nan, torch.nan), (torch.inf, torch.inf), (-torch.inf, 0.0)):
        logits = torch.full((1, 2, 17), value)
        nowhere = [torch.zeros(0, dtype=torch.int64)] * 3
        total = focal_loss(logits, torch.ones(1, 2), *nowhere)
        torch.testing.assert_close(total, torch.tensor(wanted), equal_nan=True)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_gradcheck(capability, backend):
    call = arguments((2, 2, 5, 3), 4, torch.float64)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: focal_loss(x, *call[1:]), call[0])


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_nothing_to_add_up(backend, shape):
    logits = torch.zeros(shape, requires_grad=True)
    nowhere = [torch.zeros(0, dtype=torch.int64)] * 3
    with use_backend(backend):
        total = focal_loss(logits, torch.ones(shape[1:3]), *nowhere)
        assert torch.equal(total, torch.zeros(shape[0]))
        assert torch.autograd.grad(total.sum(), logits)[0].shape == shape


BAD = [
    (ValueError, r"logits must be a tensor \[..., B, A, C\], got \[4, 5\]; ", {0: torch.zeros(4, 5)}),
    (TypeError, "logits must be .*int64", {0: torch.zeros(1, 2, 3, dtype=torch.int64)}),
    (ValueError, r"weight must be \[B, A\] = \[2, 9\], got \[2, 8\]; ", {1: torch.ones(2, 8)}),
    (ValueError, r"label must be int64 \[4\], got torch.int64 \[3\]; ", {4: torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "label must be int64 .*int32", {4: torch.zeros(4, dtype=torch.int32)}),
    (ValueError, "must be in range, got 5 where there are 5; ", {4: torch.tensor([0, 1, 5, 2])}),
    (ValueError, "must be in range, got -1 where there are 2; ", {2: torch.tensor([0, 1, -1, 0])}),
    (ValueError, "weight must be on cpu as logits, got meta; ", {1: torch.ones(2, 9, device="meta")}),
]


@pytest.mark.parametrize("error, message, changed", BAD, ids=[case[1][:30] for case in BAD])
def test_bad_arguments(error, message, changed):
    call = arguments()
    for place, value in changed.items():
        call[place] = value
    with pytest.raises(error, match=f"^focal_loss: .*{message}"):
        focal_loss(*call)
