"""Pictures of images: boxes on them, crops, attention over them: uint8 [H, W, 3] arrays in, PNG bytes out.

Small images are enlarged before anything is drawn on them, so that lines and letters stay sharp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

from fastkd.report.html import clean
from fastkd.report.plots import encode_png

RIGHT_COLOUR, WRONG_COLOUR, MISSED_COLOUR, TRUTH_COLOUR = "#00d084", "#ff4d3d", "#ffd400", "#35b6ff"


@dataclass(frozen=True)
class Mark:
    """A box to draw: xyxy in pixels of the image, its colour, a short text ("" for none), solid or dashed."""

    box: tuple[float, float, float, float]
    colour: str
    text: str = ""
    dashed: bool = False


def annotated(image: np.ndarray, marks: list[Mark]) -> bytes:
    """The image, enlarged where it is small, with boxes and their texts; texts avoid each other where they can."""
    picture, scale = _sized(image)
    draw = ImageDraw.Draw(picture)
    font = _font(13)
    frames = [tuple(value * scale for value in mark.box) for mark in marks]
    for mark, frame in zip(marks, frames):
        _draw_box(draw, frame, mark.colour, mark.dashed)
    taken: list[tuple[float, float, float, float]] = []
    for mark, frame in zip(marks, frames):
        if mark.text:
            _draw_tag(draw, frame, clean(mark.text, 24), mark.colour, font, picture.size, taken)
    return encode_png(picture)


def framed(image: np.ndarray, marks: list[Mark]) -> np.ndarray:
    """The image with boxes, without texts, as a uint8 array at the size `annotated` gives it."""
    picture, scale = _sized(image)
    draw = ImageDraw.Draw(picture)
    for mark in marks:
        _draw_box(draw, tuple(value * scale for value in mark.box), mark.colour, mark.dashed)
    return np.asarray(picture)


def crop(image: np.ndarray, marks: list[Mark], focus, side: int = 180, margin: float = 0.6) -> bytes:
    """A square cut-out around the box `focus` and its surroundings, about `side` pixels wide; grey outside."""
    x1, y1, x2, y2 = focus
    half = int(np.ceil(max(x2 - x1, y2 - y1, 12.0) * (0.5 + margin)))
    left, top = round((x1 + x2) / 2) - half, round((y1 + y2) / 2) - half
    region = Image.new("RGB", (2 * half, 2 * half), "#8a8f98")
    region.paste(Image.fromarray(image), (-left, -top))
    picture, scale = _sized(np.asarray(region), enlarged=side * 1.2, reduced=side)
    draw = ImageDraw.Draw(picture)
    for mark in marks:
        a, b, c, d = mark.box
        _draw_box(draw, tuple(scale * v for v in (a - left, b - top, c - left, d - top)), mark.colour, mark.dashed)
    return encode_png(picture, colours=128)


def attention_strip(image: np.ndarray, box, heads: np.ndarray, titles: list[str], tile: int = 168) -> bytes:
    """The image with one instance's box, then the attention of each head over it, on one colour scale.

    Args:
        image: uint8 [H, W, 3].
        box: the instance, xyxy in pixels.
        heads: [G, H, W] attention as density over the image.
        titles: G + 1 short texts, the first for the image itself.
    """
    columns = 5 if len(heads) > 5 else len(heads) + 1
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] / 255
    top = max(float(np.quantile(heads, 0.998)), 1e-12)
    tiles = [(image, titles[0])]
    for head, title in zip(heads, titles[1:]):
        strength = np.clip(head / top, 0, 1)
        colour = colormaps["inferno"](strength)[..., :3]
        weight = 0.25 + 0.75 * np.sqrt(strength)[..., None]
        tiles.append(((255 * np.clip(grey * 0.55 * (1 - weight) + colour * weight, 0, 1)).astype(np.uint8), title))
    return montage(tiles, columns, tile, [Mark(tuple(box), "#ffffff")])


def montage(tiles: list[tuple[np.ndarray, str]], columns: int, tile: int, marks=()) -> bytes:
    """Images of one size in rows of `columns`, each `tile` pixels wide under its title, with the same boxes on all."""
    height, width = tiles[0][0].shape[:2]
    scale = tile / width
    shape = (tile, max(1, round(height * scale)))
    header, gap = 20, 8
    rows = (len(tiles) + columns - 1) // columns
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, rows * (shape[1] + header + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (array, title) in enumerate(tiles):
        x, y = gap + index % columns * (tile + gap), gap + index // columns * (shape[1] + header + gap)
        draw.text((x, y + 2), _fitting(clean(title, 40), _font(12), tile), fill="#1a1f2b", font=_font(12))
        picture = Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(picture)
        for mark in marks:
            _draw_box(pen, tuple(value * scale for value in mark.box), mark.colour, mark.dashed)
        sheet.paste(picture, (x, y + header))
    return encode_png(sheet)


def _sized(image: np.ndarray, enlarged: float = 490, reduced: float = 360) -> tuple[Image.Image, float]:
    """The image for the page, and the factor: a whole multiple up to `enlarged` pixels, or reduced to `reduced`.

    Whole multiples keep every pixel visible as it is, and compress far better than interpolated ones.
    """
    longest = max(image.shape[:2])
    scale = float(enlarged // longest) if longest <= reduced else reduced / longest
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, method), scale


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitting(text: str, font, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("\u2026 ") + "\u2026" if len(text) > 2 else ""
    return text


def _draw_box(draw: ImageDraw.ImageDraw, frame, colour: str, dashed: bool) -> None:
    x1, y1, x2, y2 = frame
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
    if not dashed:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="#10141c", width=4)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        return
    for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        steps = max(1, int(length // 4))
        points = np.linspace(start, end, steps + 1)
        for index in range(0, steps, 2):
            draw.line((*points[index], *points[index + 1]), fill=colour, width=2)


def _draw_tag(draw, frame, text: str, colour: str, font, size, taken: list) -> None:
    """Writes `text` at the first place around the box that is inside the picture and overlaps no earlier text."""
    width, height = font.getlength(text) + 8, 17
    x1, y1, x2, y2 = frame
    places = [
        (x1 - 1, y1 - height),
        (x2 - width + 1, y1 - height),
        (x1 - 1, y2 + 1),
        (x2 - width + 1, y2 + 1),
        (x1, y1),
        (x1, y2 - height),
    ]
    places += [(x2 + 2, y) for y in (y1, (y1 + y2) / 2, y2 - height)] + [
        (x1 - width - 2, y) for y in (y1, (y1 + y2) / 2, y2 - height)
    ]
    places += [(x1 - 1, y1 - height * k) for k in (2, 3)] + [(x1 - 1, y2 + height * k) for k in (1, 2)]
    inside = []
    for x, y in places:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        inside.append((x, y, x + width, y + height))
    spot = min(inside, key=lambda place: sum(_overlap(place, other) for other in taken))  # the first of the best
    if sum(_overlap(spot, other) for other in taken) > 0.3 * width * height:
        return  # no room: the box speaks for itself
    taken.append(spot)
    draw.rectangle(spot, fill="#10141c")
    draw.rectangle((spot[0], spot[1], spot[0] + 3, spot[3]), fill=colour)
    draw.text((spot[0] + 6, spot[1] + 0.5), text, fill="#ffffff", font=font)


def _overlap(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
