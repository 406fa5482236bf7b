"""What the ops are measured on: the shape of a batch and random tensors of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import baselines


@dataclass(frozen=True)
class Shape:
    """What a call is measured on: a padded batch and the pyramid of it.

    Args:
        images, height, width: of the padded batch.
        channels, heads: of the pyramid and its attention.
        strides: of the levels.
        boxes: of each image.
        queries: of each image; real: those with a box.
        anchors: of each cell.
    """

    images: int = 2
    height: int = 800
    width: int = 1216
    channels: int = 256
    heads: int = 8
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    boxes: int = 7
    queries: int = 42
    real: int = 7
    anchors: int = 9

    @property
    def image_size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        return [(math.ceil(self.height / stride), math.ceil(self.width / stride)) for stride in self.strides]

    @property
    def cells(self) -> int:
        """S, of one image."""
        return sum(rows * columns for rows, columns in self.level_sizes)

    @property
    def elements(self) -> int:
        """Numbers in a pyramid of the whole batch."""
        return self.images * self.channels * self.cells


QUICK = Shape(1, 96, 128, 16, 4, strides=(8, 16, 32), boxes=3, queries=6, real=2, anchors=3)


class Draw:
    """Random tensors of one dtype, layout and device, from a seed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, channels_last: bool, device: torch.device, seed: int = 0):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *sizes: int, grad: bool = False, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Normal numbers times scale plus shift."""
        value = torch.randn(sizes, generator=self.generator) * scale + shift
        return value.to(self.device, self.dtype).requires_grad_(grad)

    def pyramid(self, channels: int | None = None, grad: bool = False) -> list[Tensor]:
        """L tensors [B, C, H_l, W_l]."""
        levels = []
        for size in self.shape.level_sizes:
            level = self.tensor(self.shape.images, channels or self.shape.channels, *size, shift=0.5)
            levels.append(level.contiguous(memory_format=self.format).requires_grad_(grad))
        return levels

    def in_lines(self, masks: Sequence[Tensor]) -> int:
        """Numbers of a pyramid that lie in the cache lines of the cells set in masks, L tensors [B, H_l, W_l] bool.

        Contiguous levels are read by lines of cells, channels-last ones cell by cell.
        """
        cells = 0
        for mask in masks:
            flat = mask.flatten(1).int()
            line = 1 if self.format == torch.channels_last else 64 // self.dtype.itemsize
            cells += line * int(F.pad(flat, (0, -flat.shape[1] % line)).unflatten(1, (-1, line)).amax(2).sum())
        return min(cells, self.shape.images * self.shape.cells) * self.shape.channels

    def in_objects(self, covers: Sequence[Tensor]) -> int:
        """The same of the cells of objects, L tensors [B * K, H_l, W_l] bool."""
        return self.in_lines([cover.unflatten(0, (self.shape.images, -1)).any(1) for cover in covers])

    def in_boxes(self, boxes: Tensor) -> int:
        """The same of boxes [B * K, 4]."""
        size = self.shape.image_size
        return self.in_objects([baselines.box_cover(boxes, size, level) for level in self.shape.level_sizes])

    def in_masks(self, masks: Tensor) -> int:
        """The same of masks [B * K, H, W]."""
        return self.in_objects([baselines.mask_cover(masks, level) for level in self.shape.level_sizes])

    def boxes(self) -> tuple[Tensor, Tensor]:
        """Boxes [B * K, 4] between 16 and 512 pixels a side, clipped to the image, and their images."""
        shape = self.shape
        count, limit = shape.images * shape.boxes, torch.tensor([shape.width, shape.height] * 2)
        uniform = torch.rand(count, 4, generator=self.generator)
        side = 16 * 32 ** uniform[:, :2]
        centre = uniform[:, 2:] * limit[:2]
        boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1).clamp(min=0).minimum(limit)
        return boxes.to(self.device), torch.arange(count, device=self.device) // shape.boxes

    def masks(self) -> tuple[Tensor, Tensor]:
        """An ellipse in each box: [B * K, H, W] bool, and their images."""
        boxes, index = self.boxes()
        x1, y1, x2, y2 = (boxes[:, axis, None, None] for axis in range(4))
        y = torch.arange(self.shape.height, device=self.device)[:, None] + 0.5
        x = torch.arange(self.shape.width, device=self.device) + 0.5
        across, down = ((2 * place - low - high) / (high - low) for place, low, high in ((x, x1, x2), (y, y1, y2)))
        return across.square() + down.square() <= 1, index

    def embeddings(self) -> Tensor:
        """[L, B * K, C]."""
        shape = self.shape
        return self.tensor(len(shape.strides), shape.images * shape.boxes, shape.channels, grad=True)
