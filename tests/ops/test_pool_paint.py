"""box_pool, box_paint, mask_pool, mask_paint: kernels of every instruction set against the references."""

import pytest
import torch
from kernels import (
    DTYPES,
    LAYOUTS,
    channels_last,
    check,
    close_to_float64,
    contiguous,
    expanded,
    results_and_gradients,
    same_bits,
    strided,
)

from fastkd import ops

OPS = ["box_pool", "box_paint", "mask_pool", "mask_paint"]
CASES = [
    ("box_pool", contiguous),
    ("box_pool", channels_last),
    ("mask_pool", contiguous),
    ("mask_pool", channels_last),
    ("box_paint", contiguous),  # of embeddings, which have one order
    ("mask_paint", contiguous),
]
SIZE = (64, 96)
PYRAMID = ((40, 61), (8, 12), (3, 1), (1, 1))
NAN = float("nan")


def boxes_in(counts, size=SIZE):
    """Boxes of all sizes, some beyond the image, some of no cell, and the image of each, shuffled."""
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    index = index[torch.randperm(len(index))]
    height, width = size
    corner = torch.rand(len(index), 2) * torch.tensor([1.2 * width, 1.2 * height]) - 0.1 * width
    extent = torch.rand(len(index), 2) ** 2 * torch.tensor([float(width), float(height)])
    return torch.cat([corner, corner + extent], 1), index


def masks_in(boxes, size=SIZE):
    """The boxes as masks: full, with holes, noise."""
    y, x = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    rows = (y >= boxes[:, 1:2]) & (y <= boxes[:, 3:4])
    columns = (x >= boxes[:, 0:1]) & (x <= boxes[:, 2:3])
    masks = rows[:, :, None] & columns[:, None]
    masks[1::3] &= (torch.arange(size[1]) // 9 % 3 != 1) & (torch.arange(size[0]) // 7 % 4 != 2)[:, None]
    masks[2::3] &= torch.rand(len(masks[2::3]), *size) < 0.6
    return masks


def arguments(op, counts=(3, 0, 5), channels=5, *, sizes=PYRAMID, dtype=torch.float32, layout=contiguous, size=SIZE):
    boxes, index = boxes_in(counts, size)
    where = (masks_in(boxes, size), index) if op.startswith("mask") else (boxes, index, size)
    if op.endswith("pool"):
        return [layout(torch.randn(len(counts), channels, *s).to(dtype)).requires_grad_() for s in sizes], *where
    embeddings = layout(torch.randn(len(sizes), len(index), channels).to(dtype)[None])[0].requires_grad_()
    return embeddings, *where, len(counts), list(sizes)


def pair(op):
    return getattr(ops, op), getattr(ops, f"{op}_reference")


@pytest.mark.sampled
@pytest.mark.parametrize("op, layout", CASES)
def test_more_objects_than_have_lanes_of_their_own(capability, op, layout):
    """Beyond 1,024 objects in an image, all of which overlap or none of which does."""
    small = torch.randint(0, 2, (2,)).tolist()
    for size, counts in [((16, 24), (1100, *small, 1025)), ((256, 384), (1030, *small))]:
        call = arguments(op, counts, 17, sizes=((16, 24), (3, 5)), layout=layout, size=size)
        check(*pair(op), call)
        same_bits(pair(op)[0], call, (1, 3))


def test_many_small_objects_apart_from_one_another(capability):
    """So many that they have no lanes of their own, in bands whose spans hold few cells."""
    y, x = torch.meshgrid(torch.arange(0, 72, 2), torch.arange(0, 70, 2), indexing="ij")
    corner = torch.stack([x, y], -1).flatten(0, 1).float()
    boxes, index = torch.cat([corner, corner], 1), torch.zeros(len(corner), dtype=torch.int64)
    assert len(boxes) > 1024
    for channels in (5, 37):
        levels = [torch.randn(1, channels, 72, 70).requires_grad_()]
        check(ops.box_pool, ops.box_pool_reference, (levels, boxes, index, (72, 70)))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, layout", CASES)
def test_no_worse_than_plain(capability, op, layout, dtype):
    for channels in (1, 5, 40, 150) if dtype == torch.float32 else (37,):  # single ones, vectors, blocks, and some more
        check(*pair(op), arguments(op, (3, 0, 4), channels, sizes=PYRAMID[1:], dtype=dtype, layout=layout))


@pytest.mark.parametrize("op, layout", CASES)
def test_float64_and_heavy_overlap(capability, op, layout):
    close_to_float64(*pair(op), arguments(op, (40, 1), 9, layout=layout))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op, layout", CASES[:2] + CASES[-2:-1])
def test_levels_beyond_the_caches(capability, op, layout, dtype):
    """Gradients and results of a mebibyte and more take paths of their own; 59 columns begin anywhere in a line."""
    check(*pair(op), arguments(op, (3, 30), 64, sizes=((72, 59),), dtype=dtype, layout=layout))


@pytest.mark.sampled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op, layout):
    check(*pair(op), arguments(op, layout=layout))


@pytest.mark.parametrize("op", ["box_pool", "mask_pool"])
def test_mixed_layouts(op):
    levels, *where = arguments(op)
    mixed = [layout(level.detach()).requires_grad_() for layout, level in zip(LAYOUTS, levels, strict=True)]
    check(*pair(op), (mixed, *where))
    gradients = results_and_gradients(getattr(ops, op), (mixed, *where))[1]
    assert gradients[1].is_contiguous(memory_format=torch.channels_last) and not gradients[1].is_contiguous()
    assert gradients[0].is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", ["box_paint", "mask_paint"])
def test_paint_is_channels_last_and_takes_any_gradient(op, memory_format):
    given = arguments(op, channels=20)
    painted, expected = (list(one(*given)) for one in pair(op))
    assert [level.stride() for level in painted] == [level.stride() for level in expected]
    cotangents = [torch.randn_like(level, memory_format=memory_format) for level in painted]
    found, wanted = (torch.autograd.grad(levels, given[0], cotangents)[0] for levels in (painted, expected))
    torch.testing.assert_close(found, wanted)
    one = pair(op)[0](*given)[1].sum()  # the gradients of other levels are none, this one's has strides of 0
    other = pair(op)[1](*given)[1].sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, given[0])[0] for loss in (one, other)))


EDGES = {
    "no boxes": dict(counts=(0, 0)),
    "no images": dict(counts=()),
    "no channels": dict(channels=0),
    "one cell": dict(sizes=((1, 1),)),
    "one image": dict(counts=(4,), channels=1, sizes=((1, 9), (9, 1))),
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("op", OPS)
def test_edges(op, edge):
    check(*pair(op), arguments(op, **edge))
    check(*pair(op), arguments(op, **edge, layout=channels_last if op.endswith("pool") else contiguous))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op, layout", [case for case in CASES if case[0].startswith("box")])
def test_levels_written_past_the_caches(capability, op, layout, dtype):
    """Levels of more than 1 MiB, with whole cache lines a cell and without."""
    for channels, sizes in ((64, [(96, 61)]), (33, [(3, 2900), (5800, 3)])):
        check(*pair(op), arguments(op, (3, 4), channels, sizes=sizes, dtype=dtype, layout=layout))


@pytest.mark.parametrize("op", ["box_pool", "mask_pool"])
def test_levels_without_cells(op):
    levels, *where = arguments(op, sizes=((8, 12), (0, 3), (4, 0)))
    pooled = getattr(ops, op)(levels, *where)
    assert not pooled[1:].any() and pooled[0].any()
    assert torch.autograd.grad(pooled.sum(), levels)[1].shape == (3, 5, 0, 3)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_other_cells_do_not_matter(capability, layout):
    """NaN and infinity reach the objects that cover them and no others."""
    level = torch.ones(2, 3, 6, 8)
    level[0, 1, 2, 3], level[1, 2, 5, 7] = NAN, float("inf")
    boxes = torch.tensor(
        [[0.0, 0.0, 16.0, 16.0], [24.0, 16.0, 40.0, 16.0], [8.0, 8.0, 48.0, 40.0], [0.0, 0.0, 62.0, 47.0]]
    )
    pooled = ops.box_pool([layout(level)], boxes, torch.tensor([0, 0, 1, 0]), (48, 64))[0]
    assert (pooled[[0, 2]] == 1).all() and (pooled[[1, 3]][:, [0, 2]] == 1).all() and pooled[[1, 3], 1].isnan().all()


@pytest.mark.parametrize("op", ["box_pool", "mask_pool"])
def test_references_take_half_types_that_are_not_autocasts(op):
    levels, *where = arguments(op, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (one(levels, *where) for one in pair(op))
    assert found.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_half_types_accumulate_in_float32(op):
    """300 equal objects on 64 x 96 cells: bf16 counts to 256."""
    boxes, index = torch.tensor([[0.0, 0.0, 96.0, 64.0]]).expand(300, 4), torch.zeros(300, dtype=torch.int64)
    where = (torch.ones(1, *SIZE, dtype=torch.bool).expand(300, *SIZE), index) if "mask" in op else (boxes, index, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        if op.endswith("pool"):
            pooled = getattr(ops, op)([torch.ones(1, 2, *SIZE, dtype=torch.bfloat16)], *where)
            assert (pooled == 1).all() and pooled.dtype == torch.bfloat16
        else:
            painted = getattr(ops, op)(torch.ones(1, 300, 3), *where, 1, [(5, 7)])[0]
            assert (painted == 300).all() and painted.dtype == torch.float32


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided, expanded])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, layout):
    sizes = ((4, 6), (1, 1))
    first, *rest = arguments(op, (2, 1), 3, sizes=sizes, dtype=torch.float64, size=(16, 24))
    leaves = list(first) if op.endswith("pool") else [first]

    def call(*values):
        if op.endswith("pool"):
            return getattr(ops, op)([layout(value) for value in values], *rest)
        return getattr(ops, op)(layout(values[0][None])[0], *rest)

    assert torch.autograd.gradcheck(call, leaves)


def raw_arguments(op, given):
    """The arguments that the public function passes to the raw op."""
    first, *rest = given
    first = list(first) if isinstance(first, (list, tuple)) else first
    if op.endswith("paint"):
        rest[-1] = [side for size in rest[-1] for side in size]
    return first, *(list(value) if isinstance(value, tuple) else value for value in rest)


def backward_arguments(op, given):
    """Arguments of the raw backward for the same objects."""
    first, *rest = raw_arguments(op, given)
    if op.endswith("paint"):
        return [level.detach() for level in getattr(ops, op)(*given)], *rest[:-2]
    sides = [side for level in first for side in level.shape[2:]]
    flags = [index % 2 == 1 for index in range(len(first))]
    return getattr(ops, op)(*given).detach(), *rest, first[0].shape[0], sides, flags


def draw(op):
    def arguments_of(choose):
        counts = [choose.randrange(5) for _ in range(choose.randrange(1, 4))]
        sizes = [(choose.randrange(1, 20), choose.randrange(1, 20)) for _ in range(choose.randrange(1, 4))]
        layout = choose.choice(LAYOUTS) if op.endswith("pool") else choose.choice([contiguous, strided])
        size = (choose.randrange(1, 70), choose.randrange(1, 70))
        dtype = choose.choice(DTYPES)
        return arguments(op, counts, choose.randrange(1, 20), sizes=sizes, dtype=dtype, layout=layout, size=size)

    return arguments_of


def draw_tiny(op):
    def arguments_of(choose):
        counts = [choose.randrange(3) for _ in range(2)]
        layout = choose.choice([contiguous, channels_last]) if op.endswith("pool") else contiguous
        return arguments(op, counts, 2, sizes=[(2, 3), (1, 1)], layout=layout, size=(8, 12))

    return arguments_of


LEVEL, BOXES, INDEX = torch.zeros(1, 2, 3, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
EMBEDDINGS, MASKS = torch.zeros(1, 2, 3), torch.zeros(2, 4, 4, dtype=torch.bool)
BAD = [
    ("box_pool", ([LEVEL.to(torch.float8_e5m2)], BOXES, INDEX, SIZE), r"levels must be float32, .* got torch.float8"),
    ("box_pool", ([LEVEL.to_sparse()], BOXES, INDEX, SIZE), r"levels\[0\] must be a dense tensor, got torch.sparse"),
    ("box_pool", ([LEVEL], BOXES, INDEX + 1, SIZE), r"image_index must be in \[0, 1\), got 1"),
    ("box_pool", ([LEVEL], BOXES, INDEX - 1, SIZE), r"image_index must be in \[0, 1\), got -1"),
    ("box_pool", ([LEVEL], BOXES * NAN, INDEX, SIZE), r"boxes must be finite, got NaN or infinity"),
    ("mask_pool", ([LEVEL], MASKS[:, :0], INDEX), r"masks must have pixels, got \[2, 0, 4\]"),
    ("mask_pool", ([LEVEL], MASKS, INDEX + 1), r"image_index must be in \[0, 1\), got 1"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX, SIZE, -1, [(2, 3)]), r"batch_size must be an int >= 0, got -1"),
    ("box_paint", (EMBEDDINGS, BOXES + NAN, INDEX, SIZE, 1, [(2, 3)]), r"boxes must be finite"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX + 4, SIZE, 1, [(2, 3)]), r"image_index must be in \[0, 1\), got 4"),
    ("mask_paint", (EMBEDDINGS, MASKS, INDEX, 1.5, [(2, 3)]), r"batch_size must be an int >= 0, got 1.5"),
    ("mask_paint", (EMBEDDINGS, MASKS, INDEX + 4, 1, [(2, 3)]), r"image_index must be in \[0, 1\), got 4"),
    ("mask_paint", (EMBEDDINGS.to(torch.float8_e5m2), MASKS, INDEX, 1, [(2, 3)]), r"embeddings must be float32"),
]  # fmt: skip


@pytest.mark.parametrize("op, given, message", BAD, ids=[f"{case[0]}-{case[2][:30]}" for case in BAD])
def test_bad_values(op, given, message):
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(ops, op)(*given)


def test_the_raw_ops_check_what_could_corrupt_memory():
    raw = torch.ops.fastkd
    with pytest.raises(RuntimeError, match=r"image_index must be in \[0, 1\), got 7"):
        raw.box_pool([LEVEL], BOXES, INDEX + 7, SIZE)
    with pytest.raises(RuntimeError, match="levels must agree in B, C and dtype"):
        raw.mask_pool([LEVEL, LEVEL[:, :1]], MASKS, INDEX)
    with pytest.raises(RuntimeError, match=r"embeddings must be \[2, K, C\]"):
        raw.box_paint(EMBEDDINGS, BOXES, INDEX, SIZE, 1, [2, 3, 1, 1])
    with pytest.raises(RuntimeError, match="one row for each of the 2 objects"):
        raw.mask_paint(EMBEDDINGS[:, :1], MASKS, INDEX, 1, [2, 3])
    for strange in (NAN, float("inf"), -float("inf")):  # the values of a tensor that Python did not look at
        assert torch.isfinite(raw.box_pool([LEVEL], BOXES + strange, INDEX, SIZE)).all()
