"""Small ragged batches and pyramids for the tests of ops and distillers."""

import dataclasses

import torch

from fastkd.types import Batch, ClassPriors

SIZE = (64, 96)
LEVELS = ((8, 12), (4, 6), (2, 3), (1, 1))


def ragged_batch(counts, *, num_classes=3, size=SIZE, seed=0, masks=False):
    """A batch whose image b has counts[b] boxes and is, but for the first, smaller than the padded size."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    images, total = len(counts), sum(counts)
    sizes = torch.tensor([[size[0] - 7 * (b % 3), size[1] - 13 * (b % 2)] for b in range(images)])
    index = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    limit = sizes[index].flip(1).float()
    low = uniform(total, 2) * 0.7 * limit
    high = low + (0.05 + 0.95 * uniform(total, 2)) * (limit - low)
    boxes = torch.cat([low, high], dim=1)
    drawn = None
    if masks:
        y, x = torch.arange(size[0]), torch.arange(size[1])
        inside_y = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:4])
        inside_x = (x >= boxes[:, 0:1]) & (x < boxes[:, 2:3])
        drawn = inside_y[:, :, None] & inside_x[:, None] & (uniform(total, *size) < 0.7)
    return Batch(
        images=torch.zeros(images, 3, *size),
        image_sizes=sizes,
        boxes=boxes,
        labels=(uniform(total) * num_classes).long(),
        image_index=index,
        counts=list(counts),
        masks=drawn,
        seeds=[1000 + 17 * b for b in range(images)],
    )


def ragged_pyramid(images, channels, *, levels=LEVELS, seed=0, dtype=torch.float64):
    """Random levels that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, channels, *size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in levels
    ]


def part_of(batch, images):
    """The batch of some consecutive images (a range) of a batch, with the same padding."""
    keep = (batch.image_index >= images.start) & (batch.image_index < images.stop)
    window = slice(images.start, images.stop)
    return dataclasses.replace(
        batch,
        images=batch.images[window],
        image_sizes=batch.image_sizes[window],
        boxes=batch.boxes[keep],
        labels=batch.labels[keep],
        image_index=batch.image_index[keep] - images.start,
        counts=batch.counts[window],
        masks=None if batch.masks is None else batch.masks[keep],
        seeds=batch.seeds[window],
    )


def priors(num_classes, seed=0):
    """Class priors of any number of classes; a class in five never occurs."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.rand(num_classes, generator=generator, dtype=torch.float64)
    frequency[1::5] = 0
    mean = 0.1 + 0.3 * torch.rand(num_classes, 2, generator=generator, dtype=torch.float64)
    return ClassPriors(frequency / frequency.sum(), mean, mean / 2)


def gradients(loss, module, inputs=()):
    """Gradients of loss by name: the module's parameters and the inputs; None where there is none."""
    named = dict(module.named_parameters()) | {f"input{index}": value for index, value in enumerate(inputs)}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def assert_close_gradients(actual, expected, *, tolerance):
    """Every gradient within tolerance of the largest one expected of its tensor or, if that vanishes, of 1."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        other = expected[name]
        if other is None:
            assert value is None or not value.any(), f"{name}: expected no gradient"
            continue
        assert value is not None, f"{name}: no gradient"
        error = (value - other).abs().max().item() if value.numel() else 0.0
        scale = max(other.abs().max().item() if other.numel() else 0.0, 1e-3)
        assert error <= tolerance * scale, f"{name}: error {error:.2e} of {scale:.2e}"
