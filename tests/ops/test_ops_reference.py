"""The ops' references against loops over boxes, heads and cells; what public functions refuse; the batch normaliser."""

import math

import pytest
import torch
from ragged import LEVELS, SIZE, ragged_batch, ragged_pyramid
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import ops
from fastkd.ops._support.coverage import box_cover, mask_cover
from fastkd.ops._support.normalizer import global_mean

COUNTS = (3, 0, 5)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


# coverage


class Divisors(TorchDispatchMode):
    """Collects the divisors of floating-point divisions."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.true_divide):
            self.found.append(args[1])
        return function(*args, **(kwargs or {}))


def test_cells_of_a_box_are_found_without_reciprocals():
    """On a GPU, torch divides by a Python number by multiplying with its reciprocal; by a tensor it divides."""
    with Divisors() as plain:
        torch.ones(2).div(3)
    with Divisors() as seen:
        box_cover(torch.rand(3, 4) * 50, SIZE, (8, 12))
    assert len(seen.found) == 4 and all(isinstance(divisor, torch.Tensor) for divisor in seen.found)
    assert not isinstance(plain.found[0], torch.Tensor)


def test_box_cover_is_closed_and_clamped():
    """Integer cell indices in the closed interval, corners clamped to the last pixel first."""
    boxes = torch.tensor([
        [16.0, 8.0, 32.0, 24.0],  # both ends on cells: 2..4 x 1..3 at stride 8
        [17.0, 9.0, 23.0, 15.0],  # between cells: nothing
        [90.0, 50.0, 200.0, 100.0],  # clamped to 95 and 63: 11.25..11.875 holds no cell
        [88.0, 56.0, 96.0, 64.0],  # exactly the last cell
        [-5.0, -5.0, 0.0, 0.0],  # the first cell
        [8.0, 8.0, 8.0, 8.0],  # a point on a cell
    ])  # fmt: skip
    cover = box_cover(boxes, SIZE, (8, 12))
    assert [sorted(map(tuple, cells.nonzero().tolist())) for cells in cover] == [
        [(y, x) for y in (1, 2, 3) for x in (2, 3, 4)],
        [],
        [],
        [(7, 11)],
        [(0, 0)],
        [(1, 1)],
    ]
    assert box_cover(boxes, SIZE, (1, 1)).flatten().tolist() == [False, False, False, False, True, False]
    assert box_cover(boxes[:0], SIZE, (8, 12)).shape == (0, 8, 12)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (1, 1), (64, 96)])
def test_mask_cover_is_nearest(size):
    masks = ragged_batch(COUNTS, masks=True).masks
    expected = F.interpolate(masks[:, None].float(), size=size, mode="nearest")[:, 0].bool()
    assert torch.equal(mask_cover(masks, size), expected)


def cells(cover):
    return [[tuple(cell) for cell in one.nonzero().tolist()] for one in cover]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["boxes", "masks"])
def test_pool_and_paint_equal_loops(masked, channels_last):
    batch, levels = ragged_batch(COUNTS, masks=True), ragged_pyramid(3, 5)
    if channels_last:
        levels = [level.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for level in levels]
    where = (batch.masks, batch.image_index) if masked else (batch.boxes, batch.image_index, SIZE)
    pooled = (ops.mask_pool if masked else ops.box_pool)(levels, *where)
    embeddings = random(4, 8, 5)
    painted = (ops.mask_paint if masked else ops.box_paint)(embeddings, *where, 3, LEVELS)
    covers = [cells(mask_cover(batch.masks, s) if masked else box_cover(batch.boxes, SIZE, s)) for s in LEVELS]
    expected, maps = torch.zeros(4, 8, 5, dtype=torch.float64), [torch.zeros(3, 5, *s).double() for s in LEVELS]
    for index, level in enumerate(levels):
        for k, image in enumerate(batch.image_index.tolist()):
            for y, x in covers[index][k]:
                expected[index, k] += level[image, :, y, x].detach() / len(covers[index][k])
                maps[index][image, :, y, x] += embeddings[index, k].detach()
    assert any(not covered for covered in covers[2]) and any(len(covered) > 3 for covered in covers[0])
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(list(painted), maps)
    assert torch.autograd.gradcheck(
        lambda *pyramid: (ops.mask_pool if masked else ops.box_pool)(pyramid, *where), levels, fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda e: (ops.mask_paint if masked else ops.box_paint)(e, *where, 3, LEVELS), embeddings, fast_mode=True
    )


def test_fused_forms_equal_their_parts():
    batch, levels = ragged_batch(COUNTS), ragged_pyramid(3, 5)
    where = (batch.boxes, batch.image_index, SIZE)
    weight, bias, embeddings = random(6, 5, 3, 3), random(6), random(4, 8, 5)
    painted = ops.box_paint_conv3x3(embeddings, weight, bias, *where, 3, LEVELS)
    for found, level in zip(painted, ops.box_paint(embeddings, *where, 3, LEVELS), strict=True):
        padded = F.pad(level, (1, 1, 1, 1))
        rows, columns = level.shape[2:]
        taps = sum(
            torch.einsum("bchw,oc->bohw", padded[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
            for i in range(3)
            for j in range(3)
        )
        torch.testing.assert_close(found, taps + bias[:, None, None])
    without = ops.box_paint_conv3x3(embeddings, weight, None, *where, 3, LEVELS)
    torch.testing.assert_close(without[0] + bias[:, None, None], painted[0])
    pooled = ops.norm_relu_box_pool(levels, *where)
    normalised = []
    for level in levels:
        flat = level.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normalised.append(flat.reshape(level.shape).clamp(min=0))
    torch.testing.assert_close(pooled, ops.box_pool(normalised, *where))


def test_box_ops_without_boxes():
    levels = ragged_pyramid(2, 5)
    where = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), SIZE)
    pooled = ops.box_pool(levels, *where)
    assert pooled.shape == (4, 0, 5)
    assert not torch.autograd.grad(pooled.sum(), levels)[0].any()
    embeddings, weight = random(4, 0, 5), random(5, 5, 3, 3)
    painted = ops.box_paint_conv3x3(embeddings, weight, None, *where, 2, LEVELS)
    assert not any(level.any() for level in painted) and painted[0].shape == (2, 5, 8, 12)
    assert all(value is not None for value in torch.autograd.grad(painted[0].sum(), (embeddings, weight)))


def test_half_types_accumulate_in_float32():
    """The mean of 6144 cells in bf16 and under autocast is the rounded mean, not a sum that stopped growing."""
    level = torch.full((1, 2, 64, 96), 1.0, dtype=torch.bfloat16)
    boxes, index = torch.tensor([[0.0, 0.0, 96.0, 64.0]]), torch.zeros(1, dtype=torch.int64)
    assert ops.box_pool([level], boxes, index, SIZE).tolist() == [[[1.0, 1.0]]]
    with torch.autocast("cpu", torch.bfloat16):
        many = torch.full((1, 300, 1), 1.0)
        painted = ops.box_paint(many, boxes.expand(300, 4), index.expand(300), SIZE, 1, [(2, 3)])
    assert (painted[0] == 300).all()  # bf16 counts to 256


# attention


def attention_arguments(count, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, depth, channels = 2, 2, 3, 7
    levels = [level.detach() for level in ragged_pyramid(batch, channels, levels=LEVELS[1:], dtype=dtype)]
    row = [random(batch, heads, count, size[0], dtype=dtype) for size in LEVELS[1:]]
    column = [random(batch, heads, count, size[1], dtype=dtype) for size in LEVELS[1:]]
    hidden = torch.zeros(batch, 1, 1, 4, dtype=torch.bool)
    hidden[1, ..., 2:] = True
    row[0] = row[0].masked_fill(hidden, -math.inf)
    values = [
        value.detach().requires_grad_() for value in ragged_pyramid(batch, 8, levels=LEVELS[1:], seed=2, dtype=dtype)
    ]
    weight = random(heads * depth, channels, dtype=dtype)
    return random(batch, heads, count, depth, dtype=dtype), levels, weight, row, column, values


def slow_attention(queries, levels, weight, row, column, values, chosen, temperature=1.0):
    """Output, logsumexp and mass, one query, head and cell at a time."""
    batch, heads, count, depth = queries.shape
    output, lse = torch.zeros(batch, heads, count, 4).double(), torch.zeros(batch, heads, count).double()
    mass = [torch.zeros(batch, heads, *level.shape[2:]).double() for level in levels]
    for b in range(batch):
        for g in range(heads):
            for n in range(count):
                logits = {}
                for index, level in enumerate(levels):
                    for y in range(level.shape[2]):
                        for x in range(level.shape[3]):
                            key = weight[g * depth : (g + 1) * depth] @ level[b, :, y, x]
                            bias = row[index][b, g, n, y] + column[index][b, g, n, x]
                            logits[index, y, x] = (queries[b, g, n] @ key + bias).item()
                total = sum(math.exp(value) for value in logits.values())
                heated = sum(math.exp(value / temperature) for value in logits.values())
                lse[b, g, n] = math.log(total)
                for (index, y, x), value in logits.items():
                    output[b, g, n] += math.exp(value) / total * values[index][b, g * 4 : g * 4 + 4, y, x].detach()
                    if chosen[b, n]:
                        mass[index][b, g, y, x] += math.exp(value / temperature) / heated
    return output, lse, mass


@pytest.mark.parametrize("count", [1, 9], ids=["absorbed_keys", "projected_keys"])
def test_attention_and_mass_equal_loops(count):
    arguments = attention_arguments(count)
    chosen = torch.rand(2, count) < 0.6
    chosen[0, 0] = True
    output, lse = ops.instance_attention(*arguments)
    expected, expected_lse, expected_mass = slow_attention(*arguments, chosen)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert not lse.requires_grad
    for given in (lse, None):
        mass = ops.attention_mass(*arguments[:5], chosen, given)
        torch.testing.assert_close(mass, expected_mass)
    assert not mass[0].requires_grad and not mass[0][1, :, 2:].any()
    heated = ops.attention_mass(*arguments[:5], chosen, None, 3.0)
    torch.testing.assert_close(heated, slow_attention(*arguments, chosen, 3.0)[2])
    queries, levels, weight, row, column, values = arguments
    assert torch.autograd.gradcheck(
        lambda q, w, c, v: ops.instance_attention(q, levels, w, row, [c, *column[1:]], [v, *values[1:]])[0],
        (queries, weight, column[0], values[0]),
        fast_mode=True,
    )


def test_attention_without_queries():
    arguments = attention_arguments(0)
    output, lse = ops.instance_attention(*arguments)
    assert output.shape == (2, 2, 0, 4) and lse.shape == (2, 2, 0)
    mass = ops.attention_mass(*arguments[:5], torch.zeros(2, 0, dtype=torch.bool))
    assert [tuple(level.shape) for level in mass] == [(2, 2, *size) for size in LEVELS[1:]]
    assert not any(level.any() for level in mass)


def test_attention_survives_large_logits():
    """Logits of several thousand: softmax of the difference, no overflow."""
    queries, levels, weight, row, column, values = attention_arguments(2, torch.float32)
    output, lse = ops.instance_attention(queries * 3000, levels, weight, row, column, values)
    mass = ops.attention_mass(queries * 3000, levels, weight, row, column, torch.ones(2, 2, dtype=torch.bool), lse)
    assert output.isfinite().all()
    torch.testing.assert_close(
        sum(level.flatten(2).sum(2) for level in mass), torch.full((2, 2), 2.0), rtol=2e-2, atol=0
    )


def test_value_mimic_equals_loops():
    student, teacher = ragged_pyramid(2, 8), ragged_pyramid(2, 8, seed=1)
    mass = [level.abs().detach() for level in ragged_pyramid(2, 2, seed=2)]
    for level in mass:
        level[1, 1] = 0  # a head that looks nowhere
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for b in range(2):
        for g in range(2):
            total = sum(level[b, g].sum() for level in mass)
            for s, t, m in zip(student, teacher, mass, strict=True):
                for y in range(s.shape[2]):
                    for x in range(s.shape[3]):
                        v, u = (F.layer_norm(p[b, g * 4 : g * 4 + 4, y, x].detach(), (4,)) for p in (s, t))
                        expected[b, g] += m[b, g, y, x] * ((v - u) ** 2).mean() / max(total, 1e-6)
    torch.testing.assert_close(ops.value_mimic(student, teacher, mass), expected)
    assert expected[1, 1] == 0 and expected[1, 0] > 0
    assert torch.autograd.gradcheck(lambda *s: ops.value_mimic(s, teacher, mass), student, fast_mode=True)
    loss = ops.value_mimic(student, teacher, mass).sum()
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,) * 4


# imitation


def test_masked_mse_equals_loops():
    student, teacher = ragged_pyramid(2, 3), ragged_pyramid(2, 3, seed=1)
    masks = [level[:, 0] > 0.3 for level in ragged_pyramid(2, 1, seed=2)]
    error, count = ops.masked_mse(student, teacher, masks)
    expected, number = 0.0, 0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        for b, y, x in mask.nonzero().tolist():
            expected += ((s[b, :, y, x] - t[b, :, y, x]) ** 2).sum().item()
            number += 1
    assert count == number and error.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *s: ops.masked_mse(s, teacher, masks)[0], student, fast_mode=True)


def test_masked_mse_ignores_what_is_outside():
    """Infinities in cells that do not count leave loss and gradient finite."""
    student, teacher = ragged_pyramid(1, 2, levels=[(1, 2)]), [torch.tensor([[[[1.0, math.inf]], [[2.0, math.inf]]]])]
    error, count = ops.masked_mse(student, [teacher[0].double()], [torch.tensor([[[True, False]]])])
    assert count == 1 and error.isfinite()
    assert torch.autograd.grad(error, student)[0].isfinite().all()


def test_imitation_mask_by_hand():
    """Two cells of one level, one square anchor each: the box fits the second; psi decides about the first."""
    boxes, index = torch.tensor([[4.0, 0.0, 12.0, 8.0]]), torch.zeros(1, dtype=torch.int64)
    arguments = ([torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(8, 4)], 1, [(1, 3)])  # cells at x = 0, 4, 8: IoU 1/3, 1, 1/3
    assert ops.imitation_mask(boxes, index, *arguments, 0.3)[0].tolist() == [[[True, True, True]]]
    assert ops.imitation_mask(boxes, index, *arguments, 0.5)[0].tolist() == [[[False, True, False]]]
    assert ops.imitation_mask(boxes, index, *arguments, 1.0)[0].tolist() == [[[False, False, False]]]
    far = torch.tensor([[500.0, 500.0, 510.0, 510.0], [3.0, 3.0, 3.0, 3.0]])  # touch no anchor
    assert not ops.imitation_mask(far, torch.zeros(2, dtype=torch.int64), *arguments)[0].any()
    assert not ops.imitation_mask(boxes[:0], index[:0], *arguments)[0].any()


# what the public functions refuse

BOXES, INDEX = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
LEVEL = torch.zeros(1, 4, 8, 12)
EMBEDDINGS, KERNEL = torch.zeros(1, 2, 4), torch.zeros(4, 4, 3, 3)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: ops.box_pool(LEVEL, BOXES, INDEX, SIZE), TypeError, "levels must be a list"),
    (lambda: ops.box_pool([], BOXES, INDEX, SIZE), ValueError, "at least one level"),
    (lambda: ops.box_pool([LEVEL.long()], BOXES, INDEX, SIZE), TypeError, "floating point"),
    (lambda: ops.box_pool([LEVEL[0]], BOXES, INDEX, SIZE), ValueError, r"levels\[0\] must be \[B, C, H_l, W_l\]"),
    (lambda: ops.box_pool([LEVEL, LEVEL[:, :2]], BOXES, INDEX, SIZE), ValueError, "in B and C as the first level"),
    (lambda: ops.box_pool([LEVEL, LEVEL.double()], BOXES, INDEX, SIZE), ValueError, "as the first level"),
    (lambda: ops.box_pool([LEVEL], BOXES[:, :3], INDEX, SIZE), ValueError, r"boxes must be \[K, 4\], got \[2, 3\]"),
    (lambda: ops.box_pool([LEVEL], BOXES, INDEX[:1], SIZE), ValueError, "one entry for each of the 2 boxes"),
    (lambda: ops.box_pool([LEVEL], BOXES, INDEX.int(), SIZE), TypeError, "image_index must be int64"),
    (lambda: ops.box_pool([LEVEL], BOXES, INDEX, (64,)), ValueError, r"image_size must be \(height, width\)"),
    (lambda: ops.box_pool([LEVEL], BOXES, INDEX, (0, 4)), ValueError, "two positive ints"),
    (lambda: ops.box_pool([LEVEL], BOXES.to("meta"), INDEX.to("meta"), SIZE), ValueError, "must be on cpu"),
    (lambda: ops.norm_relu_box_pool([LEVEL], BOXES.long(), INDEX, SIZE), TypeError, "boxes must be floating point"),
    (lambda: ops.box_paint(EMBEDDINGS, BOXES, INDEX, SIZE, 1, LEVELS), ValueError, r"must be \[4, 2, C\]"),
    (lambda: ops.box_paint_conv3x3(EMBEDDINGS, KERNEL[..., :1, :1], None, BOXES, INDEX, SIZE, 1, [(8, 12)]),
     ValueError, "weight must be"),
    (lambda: ops.box_paint_conv3x3(EMBEDDINGS, KERNEL, torch.zeros(3), BOXES, INDEX, SIZE, 1, [(8, 12)]),
     ValueError, "bias must be"),
    (lambda: ops.mask_pool([LEVEL], torch.zeros(2, 64, 96), INDEX), TypeError, "masks must be bool"),
    (lambda: ops.mask_paint(EMBEDDINGS, torch.zeros(3, 4, 4).bool(), INDEX, 1, [(8, 12)]), ValueError, "3 masks"),
    (lambda: ops.instance_attention(*attention_arguments(2)[:2], torch.zeros(6, 6), *attention_arguments(2)[3:]),
     ValueError, "key_weight must be"),
    (lambda: ops.instance_attention(*attention_arguments(2)[:3], [], *attention_arguments(2)[4:]),
     ValueError, "row_bias must hold 3 tables"),
    (lambda: ops.instance_attention(*attention_arguments(2)[:5], ragged_pyramid(2, 7, levels=LEVELS[1:])),
     ValueError, "values must have a multiple of 2"),
    (lambda: ops.attention_mass(*attention_arguments(2)[:5], torch.zeros(2, 2)), TypeError, "chosen must be bool"),
    (lambda: ops.attention_mass(*attention_arguments(2)[:5], torch.zeros(2, 2).bool(), None, 0.0),
     ValueError, "temperature must be > 0"),
    (lambda: ops.attention_mass(*attention_arguments(2)[:5], torch.zeros(2, 2).bool(),
                                torch.zeros(2, 2, 2, dtype=torch.float64), 2.0),
     ValueError, "logsumexp must be None"),
    (lambda: ops.value_mimic([LEVEL], [LEVEL], [LEVEL[:, :3]]), ValueError, "divides 4 channels"),
    (lambda: ops.value_mimic([LEVEL], [LEVEL[:, :2]], [LEVEL]), ValueError, "student's 4 channels"),
    (lambda: ops.masked_mse([LEVEL], [LEVEL], [LEVEL[:, 0]]), ValueError, r"masks\[0\] must be bool"),
    (lambda: ops.imitation_mask(BOXES, INDEX, [KERNEL[0, 0]], [(8, 8)], 1, [(8, 12)]), ValueError, r"anchors\[0\]"),
    (lambda: ops.imitation_mask(BOXES, INDEX, [BOXES], [(8, 8)], 1, [(8, 12)], 2.0), ValueError, "psi must be"),
    (lambda: global_mean(3), TypeError, "count must be a tensor"),
])  # fmt: skip
def test_bad_input_is_refused_with_advice(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "; " in str(caught.value)  # says what to do


# compiled, and the normaliser


def test_ops_compile_without_graph_breaks():
    batch, levels = ragged_batch(COUNTS), ragged_pyramid(3, 5)
    embeddings = random(4, 8, 5)
    masks = [level[:, 0] > 0 for level in levels]

    def everything(levels, embeddings, boxes, index):
        pooled = ops.norm_relu_box_pool(levels, boxes, index, SIZE)
        painted = ops.box_paint(embeddings + pooled, boxes, index, SIZE, 3, LEVELS)
        return (
            ops.masked_mse(painted, levels, masks)[0]
            + ops.value_mimic(painted, levels, [p[:, :1] for p in painted]).sum()
        )

    arguments = (levels, embeddings, batch.boxes, batch.image_index)
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), everything(*arguments))


def test_global_mean_alone():
    assert global_mean(torch.tensor(3)).item() == 3.0
    assert global_mean(torch.tensor(3)).dtype == torch.float32
    assert global_mean(torch.tensor(3.5, dtype=torch.float64, requires_grad=True)).requires_grad is False
