"""One entry per op, with its calls in the tests common to all ops (test_every_op.py, test_gpu.py)."""

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import test_attention as attention
import test_box_paint_conv3x3 as conv3x3
import test_focal_loss as focal
import test_imitation_mask as imitation
import test_instance_norm_mse as norm_mse
import test_masked_mse as masked
import test_norm_relu_box_pool as norm_pool
import test_pool_paint as pool_paint
import test_value_mimic as mimic
import torch
from draws import LONG, few
from kernels import DTYPES, channels_last, contiguous, convert, strided, transposed

from fastkd.ops._support.coverage import widen
from fastkd.ops.box_paint_conv3x3 import multiply_taps
from fastkd.ops.instance_attention import kernel_arguments

Arguments = Sequence[Any]
Draw = Callable[[random.Random], Arguments]
RAW = torch.ops.fastkd


@dataclass(frozen=True)
class Case:
    """The calls of an op in the common tests.

    Args:
        name: of the op in fastkd.ops.
        call: makes the arguments of an ordinary call.
        draw: random arguments of any shape, dtype and layout.
        opchecks: calls of the raw op and of its backward.
        raw: random arguments of raw ops, to be corrupted: (raw op, draw, least share of refused calls).
        parallel: makes calls with enough work for several threads.
        traced: makes the calls to compile and export; None: `call`.
        constants: trailing arguments that are not traced.
        hostile: random arguments to be corrupted; None: `draw`.
        refused: least share of corrupted calls that are refused.
        across: numbers of threads between which the bits agree as well.
        twice: the leaf whose gradient is differentiated again; None: the op has no gradient.
        ordered: makes a call with channels-last levels whose gradients must be channels-last.
    """

    name: str
    call: Callable[[], Arguments]
    draw: Draw
    opchecks: Callable[[], Iterator[tuple[Any, Arguments]]]
    raw: Sequence[tuple[Any, Draw, float]]
    parallel: Callable[[], Iterator[Arguments]]
    traced: Callable[[], Iterator[Arguments]] | None = None
    constants: int = 0
    hostile: Draw | None = None
    refused: float = 0.3
    across: Sequence[int] = ()
    twice: int | None = 0
    ordered: Callable[[], Arguments] | None = None

    @property
    def op(self) -> Callable:
        return getattr(self.module, self.name)

    @property
    def reference(self) -> Callable:
        return getattr(self.module, f"{self.name}_reference")

    @property
    def module(self) -> Any:
        return sys.modules[f"fastkd.ops.{self.name}"]


def still(value: Any) -> Any:
    """A tensor, or the tensors of a list, detached; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [still(one) for one in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [side for pair in pairs for side in pair]


def masked_mse_opchecks():
    for dtype in few([*DTYPES, torch.float64]):
        call = masked.pyramids((2, 4), dtype, channels_last)
        yield RAW.masked_mse.default, call
        error, _ = RAW.masked_mse(*still(call))
        yield RAW.masked_mse_backward.default, (torch.ones_like(error), *still(call))


def value_mimic_opchecks():
    for dtype in few([*DTYPES, torch.float64]):
        call = mimic.pyramids((2, 2, 4), dtype, channels_last)
        yield RAW.value_mimic.default, (*call, 1e-5)
        loss, total = RAW.value_mimic(*still(call), 1e-5)
        yield RAW.value_mimic_backward.default, (torch.ones_like(loss), *still(call), total, 1e-5)


def instance_norm_mse_opchecks():
    for layouts in few([(channels_last, contiguous), (strided, transposed)]):
        call = norm_mse.pyramids([(2, 5, 4, 6), (2, 5, 1, 1), (2, 5, 0, 3)], torch.float32, *layouts)
        yield RAW.instance_norm_mse.default, (*call, 1e-5)
        loss, moments = RAW.instance_norm_mse(*still(call), 1e-5)
        for sides in ((True, False), (False, True), (True, True)):
            yield RAW.instance_norm_mse_backward.default, (torch.ones_like(loss), *still(call), moments, *sides)


def norm_relu_box_pool_opchecks():
    for dtype in few(DTYPES):
        for layout in few([contiguous, channels_last]):
            levels, *where, size = norm_pool.arguments(5, dtype, layout, 3, 2, [(4, 6), (1, 1), (0, 3)])
            yield RAW.norm_relu_box_pool.default, (levels, *where, *size, 1e-5)
            out, *kept = RAW.norm_relu_box_pool(still(levels), *where, *size, 1e-5)
            backward = (torch.ones_like(out), still(levels), *where, *size, *kept)
            yield RAW.norm_relu_box_pool_backward.default, backward


def focal_loss_opchecks():
    for dtype in few([*DTYPES, torch.float64]):
        call = focal.arguments(dtype=dtype)
        yield RAW.focal_loss, call
        yield RAW.focal_loss_backward, [torch.rand(2, dtype=call[1].dtype), *still(call)]


def imitation_mask_opchecks():
    yield RAW.imitation_mask.default, imitation.raw_arguments(imitation.arguments())


def box_paint_conv3x3_opchecks():
    for dtype in few(DTYPES):
        embeddings, weight, bias, *where, size, images, sizes = conv3x3.arguments((3, 4), dtype, 3, 2, [(4, 6), (1, 1)])
        taps = multiply_taps(embeddings, weight).detach().requires_grad_()
        where, sides = (*where, *size), (images, flat(sizes), still(bias))
        yield RAW.box_paint_conv3x3.default, (taps, still(bias).float(), *where, *sides)
        yield RAW.box_paint_conv3x3.default, (taps, None, *where, *sides)
        grads = [torch.randn(images, *pair, 4).to(dtype) for pair in sizes]
        yield RAW.box_paint_conv3x3_backward.default, (grads, *where)


def pool_paint_opchecks(op: str):
    for dtype in few([*DTYPES, torch.float64]):
        layout = channels_last if dtype == torch.float32 and op.endswith("pool") else contiguous
        given = pool_paint.arguments(op, (2, 1), 3, sizes=((4, 6), (1, 1)), dtype=dtype, layout=layout)
        yield getattr(RAW, op).default, pool_paint.raw_arguments(op, given)
        yield getattr(RAW, f"{op}_backward").default, pool_paint.backward_arguments(op, given)


def attention_opchecks(mass: bool):
    """Under --long all pairs of a dtype with a form and with the wanted gradients, else each of them in one pair."""
    forms = ((2, 2, 2, 3, 4, 2), (2, 2, 5, 2, 3, 3))  # absorbed and projected keys
    sides = ((True, True), (True, False), (False, True))
    for number, dtype in enumerate((*DTYPES, torch.float64)):
        few = not os.environ.get(LONG)
        for shape in forms[number % 2 :][:1] if few else forms:
            *call, values = convert(attention.draw(*shape, [(3, 2), (1, 2)]), dtype)
            raw = kernel_arguments(*call)
            last = [channels_last(value) for value in still(values)]
            output, logsumexp, kept = RAW.instance_attention(*still(raw), last)
            if mass:
                chosen = torch.tensor([[True] * shape[2], [False] * shape[2]])
                for given in (logsumexp, None):
                    yield RAW.attention_mass.default, (*still(raw), chosen, given, 1.0)
                continue
            yield RAW.instance_attention.default, (*raw, values)
            for wanted in sides[number % 3 :][:1] if few else sides:
                backward = (torch.ones_like(output), output, kept, *still(raw), last, *wanted)
                yield RAW.instance_attention_backward.default, backward


def norm_relu_box_pool_raw(choose):
    levels, boxes, index, size = norm_pool.draw(choose)
    return still(levels), boxes, index, *size, 1e-5


def norm_relu_box_pool_raw_backward(choose):
    call = norm_relu_box_pool_raw(choose)
    out, *kept = RAW.norm_relu_box_pool(*call)
    return out, *call[:5], *kept


def box_paint_conv3x3_raw(choose):
    embeddings, weight, bias, boxes, index, size, images, sizes = conv3x3.draw(choose)
    taps, bias = multiply_taps(embeddings, weight).detach(), None if bias is None else bias.detach().float()
    return taps, bias, boxes, index, *size, images, flat(sizes), embeddings.detach()


def box_paint_conv3x3_raw_backward(choose):
    call = box_paint_conv3x3_raw(choose)
    return RAW.box_paint_conv3x3(*call), *call[2:6]


def taps_raw(choose):
    embeddings, weight, *_ = conv3x3.draw(choose)
    return widen(embeddings.detach().flatten(0, 1)), widen(weight.detach())


def taps_raw_backward(choose):
    call = taps_raw(choose)
    return RAW.conv3x3_taps(*call), *call, choose.random() < 0.7, choose.random() < 0.7


def attention_raw(choose):
    arguments = convert(attention.draw_any(choose), torch.float32)
    return [*kernel_arguments(*arguments[:5]), arguments[5]]


def attention_raw_backward(choose):
    arguments = [value.detach() if isinstance(value, torch.Tensor) else value for value in attention_raw(choose)]
    output, _, kept = RAW.instance_attention(*arguments)
    return [torch.ones_like(output), output, kept, *arguments, True, True]


def mass_raw(choose):
    arguments = attention_raw(choose)
    return [*arguments[:5], torch.rand(arguments[0].shape[0], arguments[0].shape[2]) < 0.5, None, 1.0]


def pool_paint_case(op: str) -> Case:
    layouts = (contiguous, channels_last) if op.endswith("pool") else (contiguous,)
    tiny = pool_paint.draw_tiny(op)
    return Case(
        op,
        call=lambda: pool_paint.arguments(op, sizes=pool_paint.PYRAMID[1:]),
        draw=pool_paint.draw(op),
        opchecks=lambda: pool_paint_opchecks(op),
        raw=[
            (getattr(RAW, op), lambda choose: pool_paint.raw_arguments(op, tiny(choose)), 1 / 6),
            (getattr(RAW, f"{op}_backward"), lambda choose: pool_paint.backward_arguments(op, tiny(choose)), 1 / 6),
        ],
        parallel=lambda: (pool_paint.arguments(op, (20, 0, 9), 40, layout=layout) for layout in layouts),
        hostile=tiny,
        across=(1, 2, 3, 7),
    )


CASES = [
    Case(
        "instance_norm_mse",
        call=lambda: norm_mse.pyramids(norm_mse.PYRAMID),
        draw=norm_mse.draw,
        opchecks=instance_norm_mse_opchecks,
        raw=[(RAW.instance_norm_mse, norm_mse.draw, 1 / 3)],
        parallel=lambda: (
            norm_mse.pyramids([(3, 40, 64, 48), (3, 40, 32, 24)], torch.float32, layout, layout)
            for layout in (contiguous, channels_last)
        ),
        across=(1, 2, 3, 7),
        ordered=lambda: norm_mse.pyramids(norm_mse.PYRAMID[:2], torch.float32, channels_last, channels_last),
    ),
    *(pool_paint_case(op) for op in pool_paint.OPS),
    Case(
        "box_paint_conv3x3",
        call=conv3x3.arguments,
        draw=conv3x3.draw,
        opchecks=box_paint_conv3x3_opchecks,
        raw=[
            (RAW.box_paint_conv3x3, box_paint_conv3x3_raw, 1 / 3),
            (RAW.box_paint_conv3x3_backward, box_paint_conv3x3_raw_backward, 1 / 3),
            (RAW.conv3x3_taps, taps_raw, 1 / 3),
            (RAW.conv3x3_taps_backward, taps_raw_backward, 1 / 3),
        ],
        parallel=lambda: iter([conv3x3.arguments((4, 40), sizes=[(40, 60), (20, 30)])]),
        traced=lambda: iter([conv3x3.arguments(sizes=conv3x3.SIZES[:2])]),
        hostile=lambda choose: conv3x3.draw(choose, [(1, 1), (1, 2)]),  # corrupted, some ask for a million rows
        across=(1, 2, 5),
        twice=2,  # of the bias: the embeddings pass through conv3x3_taps first
    ),
    Case(
        "norm_relu_box_pool",
        call=norm_pool.arguments,
        draw=norm_pool.draw,
        opchecks=norm_relu_box_pool_opchecks,
        raw=[
            (RAW.norm_relu_box_pool, norm_relu_box_pool_raw, 1 / 3),
            (RAW.norm_relu_box_pool_backward, norm_relu_box_pool_raw_backward, 1 / 3),
        ],
        parallel=lambda: (
            norm_pool.arguments(40, layout=layout, sizes=[(40, 60), (20, 30)]) for layout in (contiguous, channels_last)
        ),
        traced=lambda: iter([norm_pool.arguments(sizes=norm_pool.SIZES[:2])]),
        across=(1, 2, 5),
        ordered=lambda: norm_pool.arguments(layout=channels_last, sizes=norm_pool.SIZES[:2]),
    ),
    Case(
        "instance_attention",
        call=lambda: attention.draw(*attention.FEW),
        draw=attention.draw_any,
        opchecks=lambda: attention_opchecks(mass=False),
        raw=[
            (RAW.instance_attention, attention_raw, 1 / 3),
            (RAW.instance_attention_backward, attention_raw_backward, 1 / 3),
        ],
        parallel=lambda: (attention.draw(*shape) for shape in (attention.LONG, attention.BROAD)),
        traced=lambda: (attention.draw(*shape) for shape in (attention.FEW, attention.MANY)),
        hostile=attention.draw_wide,
        refused=0.25,
    ),
    Case(
        "attention_mass",
        call=lambda: attention.for_mass(attention.draw(*attention.FEW)),
        draw=attention.draw_mass,
        opchecks=lambda: attention_opchecks(mass=True),
        raw=[(RAW.attention_mass, mass_raw, 1 / 3)],
        parallel=lambda: (
            attention.for_mass(attention.draw(*shape), False) for shape in (attention.LONG, attention.BROAD)
        ),
        traced=lambda: (attention.for_mass(attention.draw(*shape)) for shape in (attention.FEW, attention.MANY)),
        refused=0.25,
        twice=None,
    ),
    Case(
        "value_mimic",
        call=mimic.pyramids,
        draw=mimic.draw,
        opchecks=value_mimic_opchecks,
        raw=[(RAW.value_mimic, mimic.draw, 1 / 3)],
        parallel=lambda: (
            mimic.pyramids((2, 4, 8), layout=layout, sizes=[(90, 60), (40, 30)])
            for layout in (contiguous, channels_last)
        ),
        ordered=lambda: mimic.pyramids(layout=channels_last, sizes=mimic.SIZES[:2]),
    ),
    Case(
        "imitation_mask",
        call=imitation.arguments,
        draw=imitation.draw,
        opchecks=imitation_mask_opchecks,
        raw=[(RAW.imitation_mask, lambda choose: imitation.raw_arguments(imitation.draw(choose)), 1 / 3)],
        parallel=lambda: iter([imitation.arguments(40)]),
        constants=4,
        twice=None,
    ),
    Case(
        "masked_mse",
        call=masked.pyramids,
        draw=masked.draw,
        opchecks=masked_mse_opchecks,
        raw=[(RAW.masked_mse, masked.draw, 1 / 3)],
        parallel=lambda: (
            masked.pyramids((2, 40), layout=layout, sizes=[(50, 40), (20, 30)])
            for layout in (contiguous, channels_last)
        ),
        ordered=lambda: masked.pyramids(layout=channels_last, sizes=masked.SIZES[:2]),
    ),
    Case(
        "focal_loss",
        call=focal.arguments,
        draw=focal.draw,
        opchecks=focal_loss_opchecks,
        raw=[
            (RAW.focal_loss, focal.draw, 1 / 6),
            (
                RAW.focal_loss_backward,
                lambda choose: [torch.rand(2), *focal.arguments(positives=choose.randint(0, 5))],
                1 / 6,
            ),
        ],
        parallel=lambda: iter([focal.arguments((2, 2, 900, 80), 20)]),
    ),
]
