"""Draws detections on an image: boxes, masks, class names and scores."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 480  # pixels: smaller images are enlarged first, so that lines and letters stay readable
MASK_OPACITY = 0.45


def class_colour(label: int) -> tuple[int, int, int]:
    """A saturated colour; successive labels get distant hues (multiples of the golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb((0.08 + label * 0.618034) % 1.0, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    class_names: list[str],
    masks: np.ndarray | None = None,
) -> Image.Image:
    """A copy of the image with detections drawn on it, the highest score on top.

    Args:
        image: RGB.
        boxes: [D, 4] xyxy in pixels of `image`.
        scores: [D].
        labels: [D], indices into class_names.
        class_names: by label.
        masks: [D, H, W] bool over `image`, or None.
    Returns: RGB image, enlarged by a whole number if `image` is small.
    """
    zoom = max(1, SMALLEST // max(image.size))
    picture = image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    weakest_first = np.argsort(scores, kind="stable")
    if masks is not None:
        picture = _tint(picture, masks, labels, weakest_first, zoom)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 400))
    font = ImageFont.load_default(size=max(11, round(max(picture.size) / 45)))
    for index in weakest_first:
        frame = [float(value) * zoom for value in boxes[index]]
        colour = class_colour(int(labels[index]))
        draw.rectangle(frame, outline=colour, width=line)
    for index in weakest_first:
        text = f"{class_names[int(labels[index])]} {float(scores[index]):.2f}"
        _tag(draw, text, [float(value) * zoom for value in boxes[index]], class_colour(int(labels[index])), font)
    return picture


def _tint(picture: Image.Image, masks: np.ndarray, labels, order, zoom: int) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float32).copy()
    for index in order:
        inside = masks[index].repeat(zoom, axis=0).repeat(zoom, axis=1)
        colour = np.array(class_colour(int(labels[index])), dtype=np.float32)
        pixels[inside] += MASK_OPACITY * (colour - pixels[inside])
    return Image.fromarray(pixels.round().astype(np.uint8))


def _tag(draw: ImageDraw.ImageDraw, text: str, frame: list[float], colour, font) -> None:
    """A text label at the box's upper edge, moved inside the image if necessary."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 4
    x = min(max(0.0, frame[0]), max(0.0, draw.im.size[0] - width))
    y = frame[1] - height if frame[1] >= height else min(frame[1], max(0.0, draw.im.size[1] - height))
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    draw.text((x + 3 - left, y + 2 - top), text, fill="black" if luminance > 110 else "white", font=font)
