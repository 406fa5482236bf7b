"""ICD's queries: real boxes and drawn fakes, described so that the decoder must look for them (methods 1.1)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.distillers.constants import constant, numbers
from fastkd.distillers.linears import Biases
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
        weights: [2, B, N] float32, 1 where valid, 1 where real, else 0.
        totals: [2] float32, how many are valid and real.
    """

    real: Tensor
    valid: Tensor
    chosen: Tensor
    real_slots: Tensor
    weights: Tensor
    totals: Tensor


SLOT_NAMES = tuple(item.name for item in dataclasses.fields(QuerySlots))


@dataclass(kw_only=True)
class Queries(QuerySlots):
    """Queries of a batch; in every image the real ones come first, in the batch's order.

    Args:
        boxes: [B, N, 4] xyxy, divided by the image's size.
        labels: [B, N] int64.
        anchors: [B, N, 2] (x, y), divided by the image's size.
        sides: [B, N, 2] (width, height) of the boxes, divided by the image's size.
        pixels: [B, N, 2] the same in pixels of that image.
    """

    boxes: Tensor
    labels: Tensor
    anchors: Tensor
    sides: Tensor
    pixels: Tensor


def query_count(count: int, rho: float, max_queries: int) -> int:
    """Queries of an image with `count` boxes: min(max(1, floor(count * (1 + rho))), max(max_queries, count))."""
    return min(max(1, math.floor(count * (1 + rho))), max(max_queries, count))


# An op of its own, so that torch.compile and torch.export keep the draws in the graph: they can trace no generator.
@torch.library.custom_op(
    "fastkd::seeded_draws", mutates_args=(), schema="(SymInt[] seeds, SymInt[] totals, SymInt longest) -> Tensor"
)
def _seeded_draws(seeds: Sequence[int], totals: Sequence[int], longest: int) -> Tensor:
    """The draws [images, longest, 7] of `Draws`; image b's first totals[b] come from a generator seeded seeds[b]."""
    draws = torch.zeros(len(seeds), longest, 7)
    for own, seed, total in zip(draws, seeds, totals, strict=True):
        generator = torch.Generator().manual_seed(seed)
        own[:total, :5] = torch.rand(total, 5, generator=generator)
        own[:total, 5:] = torch.randn(total, 2, generator=generator).clamp(-2, 2)
    draws[..., 1:3].mul_(0.94).add_(0.03)
    draws[..., 3:5].mul_(0.6).add_(0.2)
    return draws


@_seeded_draws.register_fake
def _(seeds, totals, longest):
    return torch.empty(len(seeds), longest, 7)


def prior_tables(frequency: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """What fakes are drawn with: cumulative frequencies [classes] float64, and [classes, 4] float32 mean | std."""
    cumulative = frequency.cumsum(0)
    return cumulative / cumulative[-1], torch.cat([mean, std], dim=1).float()


def _fake_boxes(draws: Tensor, cumulative: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] and labels [...] from `Draws` and `prior_tables`."""
    chance, centre, _, normal = draws.split([1, 2, 2, 2], dim=-1)
    labels = torch.searchsorted(cumulative, chance[..., 0].to(cumulative), right=True)
    mean, std = sizes[labels].split(2, dim=-1)
    size = torch.addcmul(mean, std, normal).clamp(0.002, 0.7).to(draws)
    corners = [torch.add(centre, size, alpha=-0.5), torch.add(centre, size, alpha=0.5)]
    return torch.cat(corners, dim=-1).clamp(0, 1), labels


@dataclass(kw_only=True)
class Draws(QuerySlots):
    """What of the queries needs the counts and seeds, which only the host knows.

    Args:
        draws: [B, N, 7] float32: of the class, uniform in [0, 1); of the box's centre (x, y), in [0.03, 0.97); of the
            anchor's place in the box (x, y), in [0.2, 0.8); of the box's sides, normal within [-2, 2].
    """

    draws: Tensor


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
    valid, real, chosen = (
        [[place < number for place in range(width)] for number in numbers]
        for numbers, width in ((totals, longest), (counts, longest), (counts, most_real))
    )
    slots = [image * longest + place for image, count in enumerate(counts) for place in range(count)]
    made = {  # on the host, so that the device gets them ready
        "valid": torch.tensor(valid),
        "real": torch.tensor(real),
        "chosen": torch.tensor(chosen, dtype=torch.bool),
        "real_slots": torch.tensor(slots, dtype=torch.int64),
        "weights": torch.tensor([valid, real], dtype=torch.float32),
        "totals": torch.tensor([sum(totals), sum(counts)], dtype=torch.float32),
        "draws": _seeded_draws(batch.seeds, totals, longest),
    }
    return Draws(**{name: values.to(boxes.device, non_blocking=True) for name, values in made.items()})


def draw_queries(
    batch: Batch,
    cumulative: Tensor,
    sizes: Tensor,
    *,
    rho: float = 5.0,
    max_queries: int = 300,
    draws: Draws | None = None,
) -> Queries:
    """Real boxes and fakes of every image, with jittered anchor points.

    Args:
        batch: boxes, labels and seeds; an image's draws depend on its seed and number of boxes only.
        cumulative, sizes: `prior_tables` of the training set, on the batch's device.
        rho: fakes per real box.
        max_queries: M, most queries of an image with fewer boxes than that.
        draws: of the batch, made before; given, no count and no seed is looked at.
    Returns: Queries with N the most of any image; an image without boxes has one fake query.
    Raises: ValueError if the batch's counts or seeds do not fit its images.
    """
    if draws is None:
        draws = make_draws(batch, rho=rho, max_queries=max_queries)
    real_slots, shape = draws.real_slots, draws.draws.shape[:2]
    image = batch.image_sizes.to(real_slots.device).index_select(1, _width_height(real_slots.device))  # [B, 4] w h w h
    fakes, labels = _fake_boxes(draws.draws, cumulative, sizes)
    real = batch.boxes.float() / image.index_select(0, batch.image_index)
    boxes = fakes.flatten(0, 1).index_copy(0, real_slots, real).unflatten(0, shape)
    corner, end = boxes.split(2, dim=2)
    sides = end - corner
    return Queries(
        boxes=boxes,
        labels=labels.flatten().index_copy(0, real_slots, batch.labels).unflatten(0, shape),
        anchors=torch.addcmul(corner, sides, draws.draws[..., 3:5]),  # the centre, -0.3 .. 0.3 sizes beside it
        sides=sides,
        pixels=sides * image[:, None, :2],
        **{name: getattr(draws, name) for name in SLOT_NAMES},
    )


@constant
def _width_height(device: torch.device) -> Tensor:
    """Of (height, width): which to take for (w, h, w, h)."""
    return torch.tensor([1, 0, 1, 0]).to(device, non_blocking=True)


@constant
def angular_frequencies(device: torch.device) -> Tensor:
    """[64]: 2 pi / 10000^(2 * floor(k / 2) / 128) for k = 0, 2, .. 126."""
    powers = torch.arange(0, AXIS_FEATURES, 2, dtype=torch.float64) / AXIS_FEATURES
    return (2 * math.pi * 10000**-powers).float().to(device, non_blocking=True)


@constant
def waves(interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies and phases [128] of 64 sines and as many cosines, which are sines a quarter of a turn ahead.

    All sines and then all cosines, or turn and turn about.
    """
    frequencies, quarter = angular_frequencies(torch.device("cpu")), torch.tensor([0.0, math.pi / 2])
    if interleaved:
        tables = frequencies.repeat_interleave(2), quarter.repeat(len(frequencies))
    else:
        tables = frequencies.repeat(2), quarter.repeat_interleave(len(frequencies))
    return tuple(table.to(device, non_blocking=True) for table in tables)


def anchor_embedding(anchors: Tensor) -> Tensor:
    """[..., 2] -> [..., 256]: for x and then y, 64 sines and 64 cosines of 2 pi coordinate * frequency."""
    frequencies, phases = waves(False, anchors.device)
    return torch.addcmul(phases, anchors.float()[..., None], frequencies).sin().flatten(-2)


def scale_indicator(pixels: Tensor) -> Tensor:
    """[..., 2] -> [..., 10]: for w and then h, one-hot over 5 of floor(clamp(log(size) * 1.44 - 5, 0, 4))."""
    return _scale_flags(pixels).float()


def _scale_flags(pixels: Tensor) -> Tensor:
    scale = torch.bucketize(pixels.float(), _scale_edges(pixels.device), right=True)
    return (scale[..., None] == numbers(SCALE_BINS, pixels.device)).flatten(-2)


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
        parts = [one_hot, anchor_embedding(queries.anchors), _scale_flags(queries.pixels)]
        return torch.cat(parts, dim=-1)  # flags become floats here

    def forward(self, queries: Queries, biases: Biases | None = None) -> Tensor:
        """[B, N, channels]; biases: those of the layers among others, instead of their own."""
        described = self.describe(queries).to(self.layers[0].weight.dtype)
        return self.layers(described) if biases is None else biases.apply_all(self.layers, described)
