"""ICD's queries: real boxes and drawn fakes, described so that the decoder must look for them (methods 1.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.distillers.constants import constant, numbers
from fastkd.types import Batch

AXIS_FEATURES = 128
SCALE_BINS = 5
DESCRIPTOR_EXTRA = 2 * AXIS_FEATURES + 2 * SCALE_BINS


@dataclass(kw_only=True)
class QuerySlots:
    """Which of the queries, padded to N of every image, are what; in an image the real ones come first.

    Args:
        real: [B, N] bool.
        valid: [B, N] bool, False in the padding.
        chosen: [B, n] bool, the first n columns of `real`, n the most real queries of an image.
        real_slots: [K] int64, image * N + place of the batch's boxes.
    """

    real: Tensor
    valid: Tensor
    chosen: Tensor
    real_slots: Tensor


@dataclass(kw_only=True)
class Queries(QuerySlots):
    """Queries of a batch; in every image the real ones come first, in the batch's order.

    Args:
        boxes: [B, N, 4] xyxy, divided by the image's size.
        labels: [B, N] int64.
        anchors: [B, N, 2] (x, y), divided by the image's size.
        pixels: [B, N, 2] (width, height) of the boxes in pixels of that image.
    """

    boxes: Tensor
    labels: Tensor
    anchors: Tensor
    pixels: Tensor


def query_count(count: int, rho: float, max_queries: int) -> int:
    """Queries of an image with `count` boxes: min(max(1, floor(count * (1 + rho))), max(max_queries, count))."""
    return min(max(1, math.floor(count * (1 + rho))), max(max_queries, count))


# An op of its own, so that torch.compile and torch.export keep the draws in the graph: they can trace no generator.
@torch.library.custom_op(
    "fastkd::seeded_draws", mutates_args=(), schema="(SymInt[] seeds, SymInt[] totals) -> (Tensor, Tensor)"
)
def _seeded_draws(seeds: Sequence[int], totals: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Uniforms [sum of totals, 5] and normals [sum of totals, 2]; image b's come from a generator seeded seeds[b]."""
    uniform, normal = [], []
    for seed, total in zip(seeds, totals, strict=True):
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(total, 5, generator=generator))
        normal.append(torch.randn(total, 2, generator=generator))
    return torch.cat(uniform), torch.cat(normal)


@_seeded_draws.register_fake
def _(seeds, totals):
    return torch.empty(sum(totals), 5), torch.empty(sum(totals), 2)


def _fake_boxes(uniform: Tensor, normal: Tensor, frequency: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] and labels [...] from the priors; the first three uniforms are the class and the centre."""
    # a triangle instead of cumsum, which has no deterministic CUDA kernel
    cumulative = _triangle(len(frequency), frequency.dtype, frequency.device) @ frequency
    labels = torch.searchsorted(cumulative / cumulative[-1], uniform[..., 0].to(cumulative), right=True)
    size = torch.addcmul(mean[labels], std[labels], normal.clamp(-2, 2).to(std))
    size = size.clamp(0.002, 0.7).to(uniform)
    centre = 0.03 + 0.94 * uniform[..., 1:3]
    corners = [torch.add(centre, size, alpha=-0.5), torch.add(centre, size, alpha=0.5)]
    return torch.cat(corners, dim=-1).clamp(0, 1), labels


@constant
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=dtype, device=device).tril()


@dataclass(kw_only=True)
class Draws(QuerySlots):
    """What of the queries needs the counts and seeds, which only the host knows.

    Args:
        uniform: [B * N, 5] and normal: [B * N, 2]: the draws.
    """

    uniform: Tensor
    normal: Tensor


def make_draws(batch: Batch, *, rho: float = 5.0, max_queries: int = 300) -> Draws:
    """The draws of a batch, on its device; arguments and errors as of `draw_queries`."""
    counts, images, boxes = batch.counts, len(batch), batch.boxes
    if len(batch.seeds) != images:
        raise ValueError(
            f"ICD: batch.seeds must be {images} ints, one for each image, got {len(batch.seeds)}; the loader fills them"
        )
    if sum(counts) != boxes.shape[0] or len(counts) != images:
        raise ValueError(
            f"ICD: batch.counts must add up to the {boxes.shape[0]} boxes of {images} images, got {counts}; "
            "pass the boxes of each image"
        )
    totals = [query_count(count, rho, max_queries) for count in counts]
    longest, most_real = max(totals), max(counts)
    slots, real_slots = (
        torch.tensor([b * longest + n for b, number in enumerate(numbers) for n in range(number)], dtype=torch.int64)
        for numbers in (totals, counts)
    )
    valid, real, chosen = (
        torch.tensor([[place < number for place in range(width)] for number in numbers], dtype=torch.bool)
        for numbers, width in ((totals, longest), (counts, longest), (counts, most_real))
    )
    uniform, normal = (  # padded where they were drawn, so that the device gets them ready
        torch.zeros(images * longest, draws.shape[1]).index_copy(0, slots, draws)
        for draws in _seeded_draws(batch.seeds, totals)
    )
    made = {"valid": valid, "real": real, "chosen": chosen, "real_slots": real_slots}
    made |= {"uniform": uniform, "normal": normal}
    return Draws(**{name: values.to(boxes.device, non_blocking=True) for name, values in made.items()})


def draw_queries(
    batch: Batch,
    frequency: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    rho: float = 5.0,
    max_queries: int = 300,
    draws: Draws | None = None,
) -> Queries:
    """Real boxes and fakes of every image, with jittered anchor points.

    Args:
        batch: boxes, labels and seeds; an image's draws depend on its seed and number of boxes only.
        frequency, mean, std: [num_classes], [num_classes, 2], [num_classes, 2], see ClassPriors; on the batch's device.
        rho: fakes per real box.
        max_queries: M, most queries of an image with fewer boxes than that.
        draws: of the batch, made before; given, no count and no seed is looked at.
    Returns: Queries with N the most of any image; an image without boxes has one fake query.
    Raises: ValueError if the batch's counts or seeds do not fit its images.
    """
    if draws is None:
        draws = make_draws(batch, rho=rho, max_queries=max_queries)
    uniform, real_slots, shape = draws.uniform, draws.real_slots, draws.valid.shape
    sides = batch.image_sizes.to(uniform).flip(1).repeat(1, 2)  # [B, 4] = (w, h, w, h)
    xyxy, labels = _fake_boxes(uniform, draws.normal, frequency, mean, std)
    xyxy = xyxy.index_copy(0, real_slots, batch.boxes.float() / sides.index_select(0, batch.image_index))
    size = xyxy[:, 2:] - xyxy[:, :2]
    anchors = torch.addcmul(xyxy[:, :2], size, 0.2 + 0.6 * uniform[:, 3:])  # the centre, -0.3 .. 0.3 sizes beside it
    return Queries(
        boxes=xyxy.unflatten(0, shape),
        labels=labels.index_copy(0, real_slots, batch.labels).unflatten(0, shape),
        anchors=anchors.unflatten(0, shape),
        pixels=size.unflatten(0, shape) * sides[:, None, :2],
        real=draws.real,
        valid=draws.valid,
        chosen=draws.chosen,
        real_slots=real_slots,
    )


@constant
def angular_frequencies(device: torch.device) -> Tensor:
    """[64]: 2 pi / 10000^(2 * floor(k / 2) / 128) for k = 0, 2, .. 126."""
    powers = torch.arange(0, AXIS_FEATURES, 2, dtype=torch.float64) / AXIS_FEATURES
    return (2 * math.pi * 10000**-powers).float().to(device, non_blocking=True)


def anchor_embedding(anchors: Tensor) -> Tensor:
    """[..., 2] -> [..., 256]: for x and then y, 64 sines and 64 cosines of 2 pi coordinate * frequency."""
    angle = anchors.float()[..., None] * angular_frequencies(anchors.device)  # [..., 2, 64]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def scale_indicator(pixels: Tensor) -> Tensor:
    """[..., 2] -> [..., 10]: for w and then h, one-hot over 5 of floor(clamp(log(size) * 1.44 - 5, 0, 4))."""
    scale = torch.bucketize(pixels.float(), _scale_edges(pixels.device), right=True)
    return (scale[..., None] == numbers(SCALE_BINS, pixels.device)).float().flatten(-2)


@constant
def _scale_edges(device: torch.device) -> Tensor:
    """The sizes at which the bin of `scale_indicator` changes: [4] pixels."""
    return torch.tensor([math.exp((5 + edge) / 1.44) for edge in range(1, SCALE_BINS)]).to(device, non_blocking=True)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class QueryEncoder(nn.Module):
    """Descriptor [one-hot class | anchor embedding | scale indicator] -> query, by three linears with ReLU between.

    Args:
        num_classes: entries of the one-hot.
        channels: of the query and between the linears.
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes
        self.layers = mlp(num_classes + DESCRIPTOR_EXTRA, channels, channels, channels)

    def describe(self, queries: Queries) -> Tensor:
        """[B, N, num_classes + 266]."""
        one_hot = queries.labels[..., None] == numbers(self.num_classes, queries.labels.device)
        parts = [one_hot, anchor_embedding(queries.anchors), scale_indicator(queries.pixels)]
        return torch.cat(parts, dim=-1)  # flags become floats here

    def forward(self, queries: Queries) -> Tensor:
        """[B, N, channels]."""
        return self.layers(self.describe(queries).to(self.layers[0].weight.dtype))
