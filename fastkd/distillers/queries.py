"""ICD's queries: ground-truth and fake boxes, encoded without their exact centre (methods 1.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.types import Batch, ClassPriors

AXIS_FEATURES = 128  # length of the sine-cosine embedding of one coordinate
SCALE_BINS = 5


@dataclass(kw_only=True)
class QueryPadding:
    """Masks and indices of the padded queries: N per image, real queries first.

    Args:
        valid: [B, N] bool, False in the padding.
        real: [B, N] bool, True for ground-truth boxes.
        mass_mask: [B, n] bool, the first n columns of `real`; n is the largest number of real queries of an image.
        real_index: [K] int64, positions of the batch's boxes in the flattened [B * N] queries.
    """

    valid: Tensor
    real: Tensor
    mass_mask: Tensor
    real_index: Tensor


@dataclass(kw_only=True)
class QueryNoise(QueryPadding):
    """Noise and padding of a batch's queries, built on the host from box counts and seeds.

    Args:
        noise: [B, N, 7] float32: uniform in [0, 1) for the class, the box centre (2) and the anchor point (2); normal,
            clipped to [-2, 2], for the box's width and height.
    """

    noise: Tensor


@dataclass(kw_only=True)
class Queries(QueryPadding):
    """Queries of a batch.

    Args:
        boxes: [B, N, 4] xyxy, normalised by the image size.
        labels: [B, N] int64.
        anchors: [B, N, 2] anchor points (x, y), normalised by the image size.
        pixel_wh: [B, N, 2] width and height of the boxes in pixels.
    """

    boxes: Tensor
    labels: Tensor
    anchors: Tensor
    pixel_wh: Tensor


def query_count(count: int, rho: float, max_queries: int) -> int:
    """Queries of an image with `count` boxes: min(max(1, floor(count * (1 + rho))), max(max_queries, count))."""
    return min(max(1, math.floor(count * (1 + rho))), max(max_queries, count))


# A custom op, because torch.compile and torch.export cannot trace a torch.Generator.
@torch.library.custom_op(
    "fastkd::seeded_noise", mutates_args=(), schema="(SymInt[] seeds, SymInt[] totals, SymInt longest) -> Tensor"
)
def seeded_noise(seeds: Sequence[int], totals: Sequence[int], longest: int) -> Tensor:
    """Noise [B, longest, 7], zero in the padding; the totals[b] rows of image b come from a generator of seeds[b]."""
    noise = torch.zeros(len(seeds), longest, 7)
    for image, (seed, total) in enumerate(zip(seeds, totals, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        noise[image, :total, :5] = torch.rand(total, 5, generator=generator)
        noise[image, :total, 5:] = torch.randn(total, 2, generator=generator).clamp(-2, 2)
    return noise


@seeded_noise.register_fake
def _(seeds, totals, longest):
    return torch.empty(len(seeds), longest, 7)


def make_noise(batch: Batch, *, rho: float = 5.0, max_queries: int = 300) -> QueryNoise:
    """Noise and padding of a batch's queries, on its device.

    Args:
        batch: its counts and seeds.
        rho: fake queries per real one.
        max_queries: maximum number of queries of an image with fewer boxes than that.
    Raises: ValueError if counts or seeds do not fit the batch's images.
    """
    counts, images, device = batch.counts, len(batch), batch.boxes.device
    if len(batch.seeds) != images:
        raise ValueError(
            f"ICD: batch.seeds must be {images} ints, one for each image, got {len(batch.seeds)}; the loader fills them"
        )
    if sum(counts) != len(batch.boxes) or len(counts) != images:
        raise ValueError(
            f"ICD: batch.counts must add up to the {len(batch.boxes)} boxes of {images} images, got {counts}; "
            "pass the boxes of each image"
        )
    totals = [query_count(count, rho, max_queries) for count in counts]
    longest = max(totals)
    real_index = [image * longest + n for image, count in enumerate(counts) for n in range(count)]
    host = {
        "valid": _first(totals, longest),
        "real": _first(counts, longest),
        "mass_mask": _first(counts, max(counts)),
        "real_index": torch.tensor(real_index, dtype=torch.int64),
        "noise": seeded_noise(batch.seeds, totals, longest),
    }
    return QueryNoise(**{name: value.to(device, non_blocking=True) for name, value in host.items()})


def _first(counts: Sequence[int], length: int) -> Tensor:
    """[len(counts), length] bool on the host, True in the first counts[i] columns of row i."""
    return torch.tensor([[n < count for n in range(length)] for count in counts], dtype=torch.bool)


def fake_boxes(noise: Tensor, priors: ClassPriors) -> tuple[Tensor, Tensor]:
    """Normalised boxes [B, N, 4] and labels [B, N] drawn from a training set's class priors.

    Args:
        noise: as in `QueryNoise`.
        priors: class frequencies, and the mean and standard deviation of each class's normalised (w, h).
    """
    category, center, _, size = noise.split([1, 2, 2, 2], dim=2)
    classes = priors.num_classes
    cumulative = priors.frequency.expand(classes, classes).tril().sum(1)  # cumsum is not deterministic on a GPU
    labels = torch.searchsorted(cumulative / cumulative[-1], category[..., 0].to(cumulative), right=True)
    wh = (priors.mean.float()[labels] + priors.std.float()[labels] * size).clamp(0.002, 0.7)
    center = 0.03 + 0.94 * center
    return torch.cat([center - wh / 2, center + wh / 2], dim=2).clamp(0, 1), labels


def draw_queries(batch: Batch, noise: QueryNoise, priors: ClassPriors) -> Queries:
    """Real and fake queries of every image, with jittered anchor points.

    Args:
        batch: boxes and labels.
        noise: noise of the batch.
        priors: class priors of the training set, on the batch's device.
    """
    device = noise.noise.device
    height, width = batch.image_sizes.to(device).unbind(1)
    image_wh = torch.stack([width, height], dim=1)  # [B, 2]
    boxes, labels = fake_boxes(noise.noise, priors)
    real_boxes = batch.boxes.float() / image_wh.repeat(1, 2)[batch.image_index]
    boxes = boxes.flatten(0, 1).index_copy(0, noise.real_index, real_boxes).view_as(boxes)
    labels = labels.flatten().index_copy(0, noise.real_index, batch.labels).view_as(labels)
    wh = boxes[..., 2:] - boxes[..., :2]
    jitter = 0.6 * noise.noise[..., 3:5] - 0.3
    return Queries(
        boxes=boxes,
        labels=labels,
        anchors=(boxes[..., :2] + boxes[..., 2:]) / 2 + jitter * wh,
        pixel_wh=wh * image_wh[:, None],
        valid=noise.valid,
        real=noise.real,
        mass_mask=noise.mass_mask,
        real_index=noise.real_index,
    )


def frequencies(device: torch.device) -> Tensor:
    """Sine-cosine frequencies [64]: 2 pi / 10000^(2 i / 128)."""
    exponent = torch.arange(0, AXIS_FEATURES, 2, dtype=torch.float64, device=device) / AXIS_FEATURES
    return (2 * math.pi * 10000**-exponent).float()


def anchor_embedding(anchors: Tensor) -> Tensor:
    """[..., 2] -> [..., 256]: for x and then y, the 64 sines, then the 64 cosines of coordinate * frequency."""
    angle = anchors[..., None] * frequencies(anchors.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def scale_indicator(pixel_wh: Tensor) -> Tensor:
    """[..., 2] -> [..., 10]: for w and then h, one-hot over 5 of floor(clamp(log(size) * 1.44 - 5, 0, 4))."""
    scale = (pixel_wh.clamp(min=1).log() * 1.44 - 5).clamp(0, SCALE_BINS - 1)  # sizes below 1 are in the first bin
    return F.one_hot(scale.floor().long(), SCALE_BINS).flatten(-2).float()


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class QueryEncoder(nn.Module):
    """Descriptor [one-hot class | anchor embedding | scale indicator] -> query, by three linear layers with ReLU.

    Args:
        num_classes: length of the one-hot.
        channels: width of the query and of the hidden layers.
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes
        self.layers = mlp(num_classes + 2 * AXIS_FEATURES + 2 * SCALE_BINS, channels, channels, channels)

    def describe(self, queries: Queries) -> Tensor:
        """Descriptors [B, N, num_classes + 266]."""
        one_hot = F.one_hot(queries.labels, self.num_classes).float()
        parts = [one_hot, anchor_embedding(queries.anchors), scale_indicator(queries.pixel_wh)]
        return torch.cat(parts, dim=2)

    def forward(self, queries: Queries) -> Tensor:
        """[B, N, channels]."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return self.layers(self.describe(queries).to(first.weight.dtype))
