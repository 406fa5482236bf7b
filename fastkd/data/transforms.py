"""Geometry and normalisation of training images. Random numbers come from a generator passed by the caller."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB values in 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Geometry:
    """The transform of one image: resize to (height, width) pixels, then flip horizontally if `flip`."""

    height: int
    width: int
    flip: bool

    def image(self, image: np.ndarray) -> np.ndarray:
        """Bilinear with antialiasing (torchvision's default). [H, W, 3] uint8 -> [height, width, 3] uint8."""
        if image.shape[:2] == (self.height, self.width) and not self.flip:
            return image
        picture = Image.fromarray(image)
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BILINEAR)
        if self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(picture)

    def boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Transforms boxes [k, 4] float32 xyxy of an image of original `size` (width, height)."""
        scale = np.array([self.width / size[0], self.height / size[1]] * 2)
        boxes = (boxes * scale).astype(np.float32)
        if self.flip:
            boxes[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        return boxes

    def masks(self, masks: np.ndarray) -> np.ndarray:
        """Flips masks [k, height, width] bool that already have the new size."""
        return masks[:, :, ::-1] if self.flip else masks


@dataclass(frozen=True)
class Augmentation:
    """Multi-scale resize and horizontal flip.

    Args:
        short_sides: lengths of the shorter side to choose from, pixels; empty keeps the original size.
        max_side: maximum of the longer side, pixels; reduces the scale if necessary. None for no limit.
        flip: probability of a horizontal flip, in [0, 1].
    """

    short_sides: tuple[int, ...] = ()
    max_side: int | None = None
    flip: float = 0.5

    def __post_init__(self):
        object.__setattr__(self, "short_sides", tuple(self.short_sides))
        if any(type(side) is not int or side < 1 for side in self.short_sides):
            raise ValueError(f"Augmentation: short_sides must be integers >= 1, got {self.short_sides}")
        if self.max_side is not None and (type(self.max_side) is not int or self.max_side < 1):
            raise ValueError(f"Augmentation: max_side must be an integer >= 1 or None, got {self.max_side!r}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"Augmentation: flip must be a probability in [0, 1], got {self.flip!r}")

    def draw(self, rng: np.random.Generator, width: int, height: int) -> Geometry:
        """Draws the geometry of an image; always takes two numbers from rng."""
        choice, mirror = rng.random(2)
        short = self.short_sides[int(choice * len(self.short_sides))] if self.short_sides else None
        return Geometry(*resized_size(width, height, short, self.max_side), bool(mirror < self.flip))


def resized_size(width: int, height: int, short_side: int | None, max_side: int | None) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to short_side (None: unchanged) with the longer <= max_side."""
    scale = 1.0 if short_side is None else short_side / min(width, height)
    if max_side is not None:
        scale = min(scale, max_side / max(width, height))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@functools.lru_cache(maxsize=64)
def _row(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset for a whole image row, which is several times faster than broadcasting RGB triples."""
    std = np.array(IMAGENET_STD, np.float64)
    factor, offset = 1 / std, np.array(IMAGENET_MEAN, np.float64) / std
    return np.tile(factor, width).astype(np.float32), np.tile(offset, width).astype(np.float32)


def normalise(image: np.ndarray, out: np.ndarray) -> None:
    """Writes (image - mean) / std, with ImageNet statistics, to the top left corner of `out`; the rest is unchanged.

    Args:
        image: [h, w, 3] uint8.
        out: [H, W, 3] float32, contiguous, H >= h, W >= w.
    """
    height, width, _ = image.shape
    factor, offset = _row(width)
    part = out.reshape(out.shape[0], -1)[:height, : 3 * width]
    np.multiply(image.reshape(height, -1), factor, out=part)
    part -= offset
