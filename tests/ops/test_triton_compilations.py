"""Number of compilations of each Triton kernel over an epoch of multi-scale batches with random box counts. No GPU.

Triton compiles a kernel for each set of types, constants and properties (equal to 1, a multiple of 16) of its
arguments. The key is computed here from the arguments of a launch with Triton's function.
"""

import random
from collections import defaultdict

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fastkd.distillers.queries import query_count  # noqa: E402
from fastkd.ops.triton import attention_backward, attention_forward, attention_mass, plan  # noqa: E402
from fastkd.ops.triton.configurations import FEW, Card  # noqa: E402

CARD, CHANNELS, HEADS = Card(9, 132), 16, 8
BINDERS = {}


def key_of(launch):
    """The key by which Triton finds a compiled kernel."""
    kernel = launch.kernel
    if kernel not in BINDERS:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        BINDERS[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    _, specialization, options = BINDERS[kernel](**launch.arguments, **options, debug=False)
    return str(specialization) + str(options)


def epoch(count, seed=0):
    """(images, height, width, boxes of each image) of padded batches: short sides 640 .. 800, long up to 1333."""
    choose = random.Random(seed)
    for _ in range(count):
        short = choose.randrange(640, 801, 32)
        long = min(1333, int(short * choose.uniform(1, 2)))
        sides = [-(-side // 32) * 32 for side in (short, long)]
        images = choose.choice((1, 2))
        boxes = [min(60, int(choose.expovariate(0.12)) + 1) for _ in range(images)]
        yield images, *(sides if choose.random() < 0.7 else reversed(sides)), boxes


def views(images, count, sides, begin):
    """Bias tables as views of one tensor that begins `begin` numbers behind an aligned place."""
    total = sum(sides)
    numbers = images * HEADS * count * total
    whole = torch.empty(numbers + begin)[begin:].view(images, HEADS, count, total)
    return list(whole.split(list(sides), dim=3))


def launches(images, height, width, boxes, dtype, order, begin):
    """All launches of ICD's ops in a step."""
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]

    def pyramid():
        shapes = [(images, CHANNELS, *size) for size in sizes]
        return [torch.empty(shape, dtype=dtype).contiguous(memory_format=order) for shape in shapes]

    def call(count):
        projected = count > FEW
        depth = CHANNELS // HEADS if projected else CHANNELS
        queries = torch.empty(images, HEADS, count, depth)
        weight = torch.empty(CHANNELS, CHANNELS) if projected else None
        tables = [views(images, count, [size[axis] for size in sizes], begin) for axis in (0, 1)]
        return [queries, levels, weight, *tables]

    levels, values = pyramid(), pyramid()
    arguments = [*call(max(query_count(number, 5.0, 300) for number in boxes)), values]
    forward, output, logsumexp, normal = attention_forward.plan_forward(*arguments, card=CARD)
    backward, _ = attention_backward.plan_backward(output, output, normal, *arguments, True, True, CARD)
    real = call(max(boxes))
    chosen = torch.ones(images, max(boxes), dtype=torch.bool)
    logsumexp = torch.empty(images, HEADS, max(boxes))
    mass, _ = attention_mass.plan_mass(*real, chosen, logsumexp, 1.0, CARD)
    return [*forward, *backward, *mass]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_an_epoch_compiles_each_kernel_at_most_twice(dtype, order):
    keys = defaultdict(set)
    for number, batch in enumerate(epoch(40)):
        for launch in launches(*batch, dtype, order, number % 4):
            keys[launch.kernel.fn.__name__].add(key_of(launch))
    found = {name: len(kinds) for name, kinds in keys.items()}
    assert len(found) == 5 and max(found.values()) <= 2, found


def test_what_is_compiled_into_a_kernel_is_counted():
    """Another alignment or another size of a block is another kernel."""
    first, second = (launches(1, 640, 640, [9], torch.bfloat16, torch.channels_last, 0)[0] for _ in range(2))
    assert key_of(first) == key_of(second)
    unaligned = torch.empty(second.arguments["queries"].numel() + 1, dtype=torch.bfloat16)[1:]
    second.arguments["queries"] = unaligned.view(second.arguments["queries"].shape)
    assert key_of(first) != key_of(second)
    second.arguments |= {"queries": first.arguments["queries"], "BLOCK_N": 128}
    assert key_of(first) != key_of(second)


@pytest.mark.parametrize("later", range(5))
def test_tables_begin_anywhere(later):
    whole = torch.arange(100.0)
    view, behind = plan.from_aligned(whole[later:])
    assert view.data_ptr() % 16 == 0 and behind == later % 4
    assert (
        torch.as_strided(view, (5,), (1,), view.storage_offset() + behind).tolist() == whole[later : later + 5].tolist()
    )


def test_unaligned_levels_are_copied():
    levels = [torch.zeros(33, dtype=torch.bfloat16)[1:].view(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    found, _ = plan.in_one_order(levels)
    assert found[0] is not levels[0] and found[1] is levels[1] and found[0].data_ptr() % 16 == 0


@pytest.mark.parametrize("images", [1, 2, 16])
@pytest.mark.parametrize("kernel", ["forward", "backward", "mass"])
def test_programs_fill_the_card(images, kernel):
    """At the published shape, with programs scheduled on free multiprocessors, little time is idle."""
    sizes = [(-(-800 // stride), -(-1344 // stride)) for stride in (8, 16, 32, 64, 128)]
    each = {"forward": images * 8 // 2, "backward": images * 8, "mass": images}[kernel]
    tile = {"forward": (2, 16), "backward": (2, 16), "mass": (4, 16)}[kernel]
    wanted = {"forward": 4, "backward": 2, "mass": 4}[kernel] * 132
    rows = plan.rows_of_parts(sizes, tile, each, wanted)
    lengths = []
    for (height, width), most in zip(sizes, rows):
        tops = range(0, height, most)
        strip = [-(-(min(top + most, height) - top) // tile[0]) for top in tops]
        lengths += strip * -(-width // tile[1])
    queue, free = [length for length in lengths for _ in range(each)], [0] * 132
    for length in queue:
        earliest = min(range(132), key=free.__getitem__)
        free[earliest] += length
    assert len(queue) >= (132 if images == 1 else 2 * 132)
    assert max(free) <= 1.35 * sum(queue) / 132
