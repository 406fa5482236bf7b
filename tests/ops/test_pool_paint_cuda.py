"""The CUDA sources of box_pool, box_paint, mask_pool and mask_paint, run by the emulation, against the references."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, strided
from test_pool_paint import CASES, EDGES, OPS, arguments, raw_arguments
from tolerance import assert_no_worse

from fastkd import ops

PYRAMID = ((9, 61), (4, 12), (3, 1), (1, 1))  # two strips, three tiles; parts of one; single cells
WHERE = {"box": 3, "mask": 2}  # arguments of an op that say where its objects are


def cotangents_of(results, layout=contiguous):
    values = [torch.randint(-8, 9, result.shape).to(result.dtype) / 8 for result in results]
    return [layout(value) if value.dim() == 4 else value for value in values]


def reference(op, given, cotangents):
    """Results and gradients in plain torch."""
    results = getattr(ops, f"{op}_reference")(*given)
    results = [results] if op.endswith("pool") else results
    first = list(given[0]) if op.endswith("pool") else [given[0]]
    return [*results, *torch.autograd.grad(results, first, [value.to(results[0].dtype) for value in cotangents])]


def emulated(op, given, cotangents, **settings):
    """Results and gradients of the raw ops."""
    first, *rest = raw_arguments(op, given)
    where = rest[: WHERE[op.split("_")[0]]]
    if op.endswith("paint"):
        results = simt.run(op, first.detach(), *rest, **settings)
        return [*results, simt.run(f"{op}_backward", cotangents, *where, **settings)]
    levels = [level.detach() for level in first]
    flags = [level.is_contiguous(memory_format=torch.channels_last) and not level.is_contiguous() for level in levels]
    shape = (len(levels[0]), [side for level in levels for side in level.shape[2:]], flags)
    result = simt.run(op, levels, *where, **settings)
    return [result, *simt.run(f"{op}_backward", cotangents[0], *where, *shape, **settings)]


def doubled(op, given):
    if op.endswith("pool"):
        return [level.detach().double().requires_grad_() for level in given[0]], *given[1:]
    return given[0].detach().double().requires_grad_(), *given[1:]


def check(op, given, layout=contiguous, **settings):
    """Asserts the tolerance rule; `layout` is that of the gradients that a paint gets."""
    results = getattr(ops, f"{op}_reference")(*given)
    cotangents = cotangents_of([results] if op.endswith("pool") else results, layout)
    actual = emulated(op, given, cotangents, **settings)
    assert_no_worse(actual, reference(op, given, cotangents), reference(op, doubled(op, given), cotangents))
    return actual


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, layout", CASES)
def test_no_worse_than_plain(op, layout, dtype):
    """Whole packs of channels, a second group that is not full; single channels."""
    for channels in (40, 5) if dtype == torch.float32 else (72,):
        given = arguments(op, (3, 0, 4), channels, sizes=PYRAMID[channels > 40 :], dtype=dtype, layout=layout)
        check(op, given, channels_last if channels > 5 else contiguous)


@pytest.mark.parametrize("op, layout", CASES)
def test_float64_and_heavy_overlap(op, layout):
    given = arguments(op, (40, 1), 9, sizes=PYRAMID[:2], dtype=torch.float64, layout=layout)
    results = getattr(ops, f"{op}_reference")(*given)
    cotangents = cotangents_of([results] if op.endswith("pool") else results)
    expected = reference(op, given, cotangents)
    torch.testing.assert_close(emulated(op, given, cotangents), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("op", ["box_pool", "mask_pool"])
def test_mixed_layouts_and_levels_without_cells(op):
    levels, *where = arguments(op, sizes=((8, 12), (4, 5), (3, 4), (0, 3)))
    layouts = (contiguous, channels_last, strided, contiguous)
    mixed = [one(level.detach()).requires_grad_() for one, level in zip(layouts, levels, strict=True)]
    actual = check(op, (mixed, *where))
    assert not actual[0][3].any() and [level.is_contiguous() for level in actual[1:]] == [True, False, True, True]


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("op", OPS)
def test_edges(op, edge):
    check(op, arguments(op, **{"sizes": PYRAMID[1:], **edge}))


@pytest.mark.parametrize("channels, rows, columns", [(7, 31, 151), (8, 64, 64)])
@pytest.mark.parametrize("op, layout", [case for case in CASES if case[0].startswith("box")])
def test_index_types(op, layout, channels, rows, columns):
    """As many elements as the narrow index of the emulation has, and one more."""
    assert channels * rows * columns in (2**15 - 1, 2**15)
    check(op, arguments(op, (3,), channels, sizes=((rows, columns),), dtype=torch.bfloat16, layout=layout))


@pytest.mark.parametrize("start", [1, 2, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_misaligned_starts(layout, start):
    """Views that begin anywhere in a 16-byte pack."""
    for channels, sides in ((8, (7, 39)), (5, (6, 9))):
        shape = (2, channels, *sides)
        stride = torch.empty(shape, memory_format=layout).stride()
        for dtype in (torch.float32, torch.float16):
            flat = torch.randn(torch.Size(shape).numel() + 8).to(dtype)
            _, *where = arguments("box_pool", (3, 4), channels, sizes=(sides,))
            check("box_pool", ([flat.as_strided(shape, stride, start).requires_grad_()], *where))
            embeddings, *where = arguments("box_paint", (3, 4), channels, sizes=(sides,))
            values = torch.randn(embeddings.numel() + 8).to(dtype)[start : start + embeddings.numel()]
            check("box_paint", (values.view(embeddings.shape).requires_grad_(), *where))


@pytest.mark.parametrize("op, layout", CASES[:4])
def test_more_objects_than_pooling_keeps(op, layout):
    """In shared memory: it goes over its strip again."""
    given = arguments(op, (17, 4), 3, sizes=((5, 7), (3, 200)), layout=layout)
    check(op, given, shared_bytes=35800)  # three objects
    with pytest.raises(RuntimeError, match=rf"{op}: a block needs .* bytes of shared memory.*; use the reference"):
        simt.run(op, *raw_arguments(op, given), shared_bytes=30000)


@pytest.mark.parametrize("shared_bytes", simt.SHARED_LIMITS.values(), ids=simt.SHARED_LIMITS.keys())
@pytest.mark.parametrize("objects, dtype", [(75, torch.float32), (80, torch.float32), (85, torch.float32),
                                            (170, torch.float16), (600, torch.float16)])  # fmt: skip
def test_static_and_dynamic_shared_memory_together(objects, dtype, shared_bytes):
    """80 and 170 objects need at most 48 KB without the static arrays, more with them; 600 need two passes."""
    check("box_pool", arguments("box_pool", (objects,), 3, sizes=((3, 5),), dtype=dtype), shared_bytes=shared_bytes)


@pytest.mark.parametrize("shared_bytes", [3072, 4200])
@pytest.mark.parametrize("op", OPS[1::2])
def test_more_objects_than_painting_keeps(op, shared_bytes):
    """In shared memory, none and 32: it looks the others up for every cell."""
    embeddings, *where = arguments(op, (37, 4), 3, sizes=((5, 7), (3, 100)), layout=contiguous)
    found = simt.run(op, *raw_arguments(op, (embeddings.detach(), *where)), shared_bytes=shared_bytes)
    plain, exact = (getattr(ops, f"{op}_reference")(one, *where) for one in (embeddings, embeddings.double()))
    assert_no_worse(found, plain, exact)


def test_more_objects_than_a_list_takes_at_once():
    embeddings, *where = arguments("box_paint", (8200,), 1, sizes=((1, 2),))
    found = simt.run("box_paint", *raw_arguments("box_paint", (embeddings.detach(), *where)))
    plain, exact = (ops.box_paint_reference(one, *where) for one in (embeddings, embeddings.double()))
    assert_no_worse(found, plain, exact)


@pytest.mark.parametrize("op, layout", CASES)
def test_same_bits_in_every_schedule(op, layout):
    given = arguments(op, (3, 2), 5, sizes=PYRAMID[1:3], layout=layout)
    results = getattr(ops, f"{op}_reference")(*given)
    cotangents = cotangents_of([results] if op.endswith("pool") else results)
    runs = [emulated(op, given, cotangents, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other))


@pytest.mark.parametrize("op", OPS)
def test_values_that_only_the_device_sees(op):
    """An image that is not there has no cells; neither has a box of NaN. Infinite boxes are clamped."""
    given = list(arguments(op, (3, 3), 4, sizes=PYRAMID[1:]))
    expected = getattr(ops, f"{op}_reference")
    for strange in (2, -1, 2**31, 2**62, -(2**63)):
        given[2] = torch.tensor([0, strange, 1, 0, strange, 1])
        check(op, tuple(given))
    if op.startswith("box"):
        given[1][0], given[1][3, 2:] = float("nan"), float("inf")
        check(op, tuple(given))
        results = expected(*given)
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_other_cells_do_not_matter(layout):
    """NaN and infinity reach the objects that cover them and no others."""
    level = torch.ones(2, 3, 6, 8)
    level[0, 1, 2, 3], level[1, 2, 5, 7] = float("nan"), float("inf")
    boxes = torch.tensor(
        [[0.0, 0.0, 16.0, 16.0], [24.0, 16.0, 40.0, 16.0], [8.0, 8.0, 48.0, 40.0], [0.0, 0.0, 62.0, 47.0]]
    )
    pooled = simt.run("box_pool", [layout(level)], boxes, torch.tensor([0, 0, 1, 0]), [48, 64])[0]
    assert (pooled[[0, 2]] == 1).all() and (pooled[[1, 3]][:, [0, 2]] == 1).all() and pooled[[1, 3], 1].isnan().all()


LEVEL, BOXES, INDEX = torch.zeros(1, 2, 3, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
EMBEDDINGS, MASKS = torch.zeros(1, 2, 3), torch.zeros(2, 4, 4, dtype=torch.bool)
BAD = [
    ("box_pool", ([LEVEL] * 17, BOXES, INDEX, [9, 9]), "at most 16 levels"),
    ("box_pool", ([], BOXES, INDEX, [9, 9]), "levels must be at least one"),
    ("box_pool", ([LEVEL, LEVEL[:, :1]], BOXES, INDEX, [9, 9]), "must be .* and agree in B, C, dtype and device"),
    ("box_pool", ([LEVEL], BOXES[:, :3], INDEX, [9, 9]), r"boxes must be \[K, 4\]"),
    ("box_pool", ([LEVEL], BOXES, INDEX[:1], [9, 9]), r"image_index must be \[K\] int64"),
    ("box_pool", ([LEVEL], BOXES, INDEX.int(), [9, 9]), r"image_index must be \[K\] int64"),
    ("box_pool", ([LEVEL], BOXES, INDEX, [9]), r"image_size must be \(H, W\)"),
    ("box_pool", ([LEVEL], BOXES, INDEX, [0, 9]), "image_size must be two positive numbers"),
    ("mask_pool", ([LEVEL], MASKS[:, :0], INDEX), r"masks must be \[K, H, W\] bool"),
    ("mask_pool", ([LEVEL], MASKS.float(), INDEX), r"masks must be \[K, H, W\] bool"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX, [9, 9], 1, [2, 3, 1, 1]), r"values must be \[2, 2, C\]"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX, [9, 9], 1, [2]), "level_sizes must be pairs"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX, [9, 9], -1, [2, 3]), "batch_size must not be negative, got -1"),
    ("box_paint", (EMBEDDINGS, BOXES, INDEX, [9, 9], 1, [2**16, 2**15]), r"fewer than 2\^30 cells"),
    ("mask_paint", (EMBEDDINGS[:, :1], MASKS, INDEX, 1, [2, 3]), r"values must be \[1, 2, C\]"),
]  # fmt: skip


@pytest.mark.parametrize("op, given, message", BAD, ids=[f"{case[0]}-{case[2][:30]}" for case in BAD])
def test_what_could_corrupt_memory_is_refused(op, given, message):
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        simt.run(op, *given)
