"""Lower bounds of op times on a GPU, PREDICTED from data sheets (`python -m benchmarks.gpu.predictions`).

One function per op counts the necessary memory traffic and operations, forward and backward; the time is the maximum of
bytes / bandwidth and operations / rate. This is a lower bound, not a measurement: launch overhead, tail effects and
caches are not modelled. `python -m benchmarks.ops --device cuda` prints the achieved fraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.ops.draws import Shape
from benchmarks.ops.rows import BY_NAME

PUBLISHED = Shape(images=16, height=800, width=1344)  # a training batch of the papers' COCO recipes


@dataclass(frozen=True)
class Card:
    """Data-sheet values, dense (without sparsity).

    Args:
        name: a substring of torch.cuda.get_device_name.
        bandwidth: memory bandwidth in bytes per second.
        tensor: operations per second of bfloat16 matrix instructions with float32 accumulation.
        scalar: float32 operations per second, two per multiply-add.
        source: the data sheet.
    """

    name: str
    bandwidth: float
    tensor: float
    scalar: float
    source: str


CARDS = (
    Card("A100", 2.039e12, 312e12, 19.5e12, "NVIDIA A100 data sheet, SXM 80 GB"),
    Card("H100", 3.35e12, 989.4e12, 66.9e12, "NVIDIA H100 data sheet, SXM"),
    Card("RTX 4090", 1.008e12, 165.2e12, 82.6e12, "NVIDIA Ada GPU Architecture white paper, appendix A"),
)
H200 = Card("H200", 4.8e12, 989.4e12, 66.9e12, "NVIDIA H200 data sheet, SXM")
KNOWN = (*CARDS, H200)  # cards with predictions beside measurements
H100 = next(card for card in CARDS if card.name == "H100")  # the card of the aims


@dataclass(frozen=True)
class Work:
    """Work of one call, forward and backward.

    Args:
        bytes: read and written at least once.
        matrix: operations of matrix instructions, two per multiply-add.
        scalar: other operations.
    """

    bytes: int
    matrix: int = 0
    scalar: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.matrix + other.matrix, self.scalar + other.scalar)

    def seconds(self, card: Card, half: bool) -> float:
        """PREDICTED time; float32 products use no matrix instructions, which would round to TF32."""
        products = self.matrix / (card.tensor if half else card.scalar)
        return max(self.bytes / card.bandwidth, products, self.scalar / card.scalar)

    def limit(self, card: Card, half: bool) -> str:
        """The limiting resource."""
        return "bytes" if self.seconds(card, half) == self.bytes / card.bandwidth else "operations"


def objects_of(shape: Shape) -> int:
    """Elements of embeddings [L, K, C]."""
    return len(shape.strides) * shape.images * shape.boxes * shape.channels


def instance_norm_mse(shape: Shape, size: int) -> Work:
    """Forward reads student and teacher; backward reads both again and writes a gradient."""
    return Work(5 * shape.elements * size, scalar=16 * shape.elements)


def box_pool(shape: Shape, size: int) -> Work:
    """Forward reads the covered cells, here all; backward writes the gradient of every cell."""
    return Work((2 * shape.elements + 2 * objects_of(shape)) * size, scalar=2 * shape.elements)


def box_paint(shape: Shape, size: int) -> Work:
    """Forward writes every cell, backward reads its gradient."""
    return box_pool(shape, size)


def box_paint_conv3x3(shape: Shape, size: int) -> Work:
    """As box_paint, plus nine products per embedding forward and twice as many backward, in float32."""
    taps = 9 * objects_of(shape)
    weights = 9 * shape.channels**2
    moved = (2 * shape.elements + 2 * objects_of(shape) + 2 * weights) * size + 4 * 2 * 2 * taps  # written and read
    return Work(moved, scalar=3 * 2 * taps * shape.channels + 2 * shape.elements)


def norm_relu_box_pool(shape: Shape, size: int) -> Work:
    """Forward reads twice, for moments and for pooling; backward reads and writes."""
    return Work((4 * shape.elements + 2 * objects_of(shape)) * size, scalar=16 * shape.elements)


def mask_pool(shape: Shape, size: int) -> Work:
    """As box_pool, plus the masks, one byte per pixel, forward and backward."""
    masks = shape.images * shape.boxes * shape.height * shape.width
    return box_pool(shape, size) + Work(2 * masks)


def mask_paint(shape: Shape, size: int) -> Work:
    """As mask_pool."""
    return mask_pool(shape, size)


def instance_attention(shape: Shape, size: int) -> Work:
    """Levels and values are read forward and backward, the gradient of values is written.

    Multiply-adds per cell: logits and output forward; gradients of probabilities, values and logits backward, without
    recomputation of the logits.
    """
    channels, count = shape.channels, shape.queries
    logits = min(shape.heads * count * channels, channels * (channels + count))
    to_queries = min(shape.heads * count * channels, channels * (channels + 2 * count))
    products = shape.images * shape.cells * (logits + 3 * count * channels + to_queries)
    softmax = 8 * shape.images * shape.heads * count * shape.cells
    return Work(5 * shape.elements * size, matrix=2 * products, scalar=softmax)


def attention_mass(shape: Shape, size: int) -> Work:
    """Levels are read, the mass is written in float32; no backward."""
    channels, count = shape.channels, shape.real
    products = shape.images * shape.cells * min(shape.heads * count * channels, channels * (channels + count))
    mass = shape.images * shape.heads * shape.cells
    return Work(shape.elements * size + 4 * mass, matrix=2 * products, scalar=4 * count * mass)


def value_mimic(shape: Shape, size: int) -> Work:
    """Forward reads student, teacher and mass; backward reads them again and writes a gradient."""
    mass = shape.images * shape.heads * shape.cells
    return Work(5 * shape.elements * size + 4 * 2 * mass, scalar=24 * shape.elements)


def mass_and_mimic(shape: Shape, size: int) -> Work:
    """`attention_mass`, then `value_mimic`."""
    return attention_mass(shape, size) + value_mimic(shape, size)


def imitation_mask(shape: Shape, size: int) -> Work:
    """Writes one byte per cell; two IoUs of about 14 operations per box and anchor of its image. No backward."""
    overlaps = shape.images * shape.boxes * shape.cells * shape.anchors
    return Work(shape.images * shape.cells, scalar=2 * 14 * overlaps)


def masked_mse(shape: Shape, size: int) -> Work:
    """Writes the full gradient; reads the masked cells of the levels, here one in six, and the mask twice."""
    moved = shape.elements * size + 4 * shape.elements * size // 6
    return Work(moved + 2 * shape.images * shape.cells, scalar=5 * shape.elements // 6)


OPS: tuple[Callable[[Shape, int], Work], ...] = (
    instance_norm_mse,
    box_pool,
    box_paint,
    box_paint_conv3x3,
    norm_relu_box_pool,
    instance_attention,
    attention_mass,
    value_mimic,
    imitation_mask,
    masked_mse,
    mask_pool,
    mask_paint,
)
MODELS = {model.__name__: model for model in (*OPS, mass_and_mimic)}  # by the name of a benchmark row's `build`


def table(shape: Shape, half: bool) -> list[str]:
    """PREDICTED milliseconds of every op on every card."""
    size = 2 if half else 4
    lines = [
        f"PREDICTED times, ms, forward and backward; nothing here was measured. B = {shape.images}, {shape.height} x "
        f"{shape.width}, C = {shape.channels}, G = {shape.heads}, {shape.boxes} boxes and {shape.queries} queries an "
        f"image, {'bfloat16' if half else 'float32'}",
        "| op | MB | GFLOP | " + " | ".join(f"{card.name} PREDICTED" for card in CARDS) + " | limited by |",
        "|" + "---|" * (len(CARDS) + 4),
    ]
    for model in OPS:
        work = model(shape, size)
        times = " | ".join(f"{1e3 * work.seconds(card, half):.3f}" for card in CARDS)
        limits = ", ".join(dict.fromkeys(work.limit(card, half) for card in CARDS))
        operations = (work.matrix + work.scalar) / 1e9
        lines.append(f"| {model.__name__} | {work.bytes / 1e6:.0f} | {operations:.1f} | {times} | {limits} |")
    return [*lines, *(f"{card.name}: {card.source}" for card in CARDS)]


def achieved(rows: dict[str, Any], device: str) -> list[str]:
    """Measured times of benchmark rows beside predicted ones; else one line with the reason.

    Args:
        rows: "rows" of the results of benchmarks.ops on a GPU.
        device: name of the GPU.
    """
    cards = [card for card in KNOWN if card.name in device]
    if not cards:
        known = ", ".join(card.name for card in KNOWN)
        return [f"No predictions for {device}: benchmarks/gpu/roofline.py knows {known}."]
    heads = ["op", "dtype", f"measured on {device}, ms", f"{cards[0].name} PREDICTED, ms", "achieved"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        model = MODELS.get(BY_NAME[name].build.__name__)
        for side, half in (("ours", False), ("bfloat16", True)):
            if model is None or side not in row["sides"]:
                continue
            shape = Shape(**{key: tuple(v) if isinstance(v, list) else v for key, v in row["shape"].items()})
            predicted = 1e3 * model(shape, 2 if half else 4).seconds(cards[0], half)
            measured = row["sides"][side]["ms"]
            kind = "bfloat16" if half else "float32"
            lines.append(f"| {name} | {kind} | {measured:.3f} | {predicted:.3f} | {predicted / measured:.0%} |")
    return lines
