"""Pictures of images with boxes, crops and attention maps: uint8 [H, W, 3] arrays in, PNG bytes out.

Small images are enlarged before drawing, so that lines and letters stay sharp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

from fastkd.report.html import clean
from fastkd.report.plots import encode_png

RIGHT_COLOUR, WRONG_COLOUR, MISSED_COLOUR, TRUTH_COLOUR = "#00d084", "#ff4d3d", "#ffd400", "#35b6ff"

OTHER_COLOUR, SHADE_COLOUR = "#ffffff", "#10141c"
GREYS = 12  # grey levels from a text's dark background to white, for antialiasing
# The first colours of every picture's palette, so that marks keep their colours even with few pixels.
KEPT_COLOURS = (
    *(RIGHT_COLOUR, WRONG_COLOUR, MISSED_COLOUR, TRUTH_COLOUR),
    *(f"#{16 + 239 * k // 11:02x}{20 + 235 * k // 11:02x}{28 + 227 * k // 11:02x}" for k in range(GREYS)),
)


@dataclass(frozen=True)
class Mark:
    """A box to draw: xyxy in pixels of the image, colour, short text ("" for none), solid or dashed."""

    box: tuple[float, float, float, float]
    colour: str
    text: str = ""
    dashed: bool = False


def annotated(image: np.ndarray, marks: list[Mark]) -> bytes:
    """The image, enlarged if small, with boxes and texts; the texts are placed so that they overlap little."""
    picture, scale = _sized(image)
    frames = _draw_boxes(picture, marks, scale)
    taken: list[tuple[float, float, float, float]] = []
    for mark, frame in zip(marks, frames):
        if mark.text:
            _draw_tag(picture, frame, frames, clean(mark.text, 24), mark.colour, taken)
    return encode_png(picture)


def crop(image: np.ndarray, marks: list[Mark], focus, side: int = 180, margin: float = 0.6) -> bytes:
    """A square crop of about `side` pixels around the box `focus`; grey outside the image."""
    x1, y1, x2, y2 = focus
    half = int(np.ceil(max(x2 - x1, y2 - y1, 12.0) * (0.5 + margin)))
    left, top = round((x1 + x2) / 2) - half, round((y1 + y2) / 2) - half
    region = Image.new("RGB", (2 * half, 2 * half), "#8a8f98")
    region.paste(Image.fromarray(image), (-left, -top))
    picture, scale = _sized(np.asarray(region), colours=128, enlarged=int(side * 1.2), reduced=side)
    _draw_boxes(picture, marks, scale, (left, top))
    return encode_png(picture)


def attention_strip(image: np.ndarray, box, heads: np.ndarray, titles: list[str], tile: int = 168) -> bytes:
    """The image with one instance's box, followed by the attention of each head over it, on one colour scale.

    Args:
        image: uint8 [H, W, 3].
        box: the instance, xyxy in pixels.
        heads: [G, H, W] attention as a density over the image.
        titles: G + 1 short texts, the first for the image.
    """
    columns = 5 if len(heads) > 5 else len(heads) + 1
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] / 255
    top = max(float(np.quantile(heads, 0.995)), 1e-12)
    tiles = [(image, titles[0])]
    for head, title in zip(heads, titles[1:]):
        strength = np.sqrt(np.clip(head / top, 0, 1))  # the root makes weak attention visible
        colour = colormaps["inferno"](0.15 + 0.85 * strength)[..., :3]
        weight = (0.1 + 0.9 * strength)[..., None]
        tiles.append(((255 * np.clip(grey * 0.8 * (1 - weight) + colour * weight, 0, 1)).astype(np.uint8), title))
    return montage(tiles, columns, tile, [Mark(tuple(box), "#ffffff")])


def montage(tiles: list[tuple[np.ndarray, str]], columns: int, tile: int, marks=()) -> bytes:
    """Images of equal size in rows of `columns`, each `tile` pixels wide under its title, all with the same boxes."""
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
        _draw_boxes(picture, marks, scale)
        sheet.paste(picture, (x, y + header))
    return encode_png(sheet)


def _sized(image: np.ndarray, colours: int = 256, enlarged: int = 490, reduced: int = 360) -> tuple[Image.Image, float]:
    """The image resized for the page: enlarged by an integer factor up to `enlarged` pixels, or reduced to `reduced`.

    Integer factors show the original pixels, and compress far better than interpolation.
    Returns: a palette image whose palette begins with KEPT_COLOURS, and the scale factor.
    """
    picture, scale = _palette_image(image.tobytes(), image.shape[:2], colours, enlarged, reduced)
    return picture.copy(), scale


@lru_cache(maxsize=4)  # the same image is shown for every run
def _palette_image(pixels: bytes, size: tuple[int, int], colours: int, enlarged: int, reduced: int):
    height, width = size
    picture, scale = Image.frombytes("RGB", (width, height), pixels), 1.0
    if max(size) > reduced:
        scale = reduced / max(size)
        picture = picture.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
        )
    free = picture.quantize(colours - len(KEPT_COLOURS), method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    indices = np.asarray(free) + np.uint8(len(KEPT_COLOURS))
    if max(size) <= reduced:
        scale = enlarged // max(size)
        indices = indices.repeat(scale, axis=0).repeat(scale, axis=1)
    result = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    kept = [int(colour[place : place + 2], 16) for colour in KEPT_COLOURS for place in (1, 3, 5)]
    result.putpalette([*kept, *(free.getpalette() or [])])
    return result, float(scale)


def _draw_boxes(
    picture: Image.Image, marks, scale: float, origin=(0.0, 0.0)
) -> list[tuple[float, float, float, float]]:
    """Draws the box of every mark; returns the boxes in pixels of the picture."""
    draw = ImageDraw.Draw(picture)
    frames = []
    for mark in marks:
        x1, y1, x2, y2 = (scale * (value - origin[place % 2]) for place, value in enumerate(mark.box))
        frames.append((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
        _draw_box(draw, frames[-1], _ink(picture, mark.colour), _ink(picture, SHADE_COLOUR), mark.dashed)
    return frames


def _ink(picture: Image.Image, colour: str) -> int | str:
    """A colour for ImageDraw: in a palette image the index in KEPT_COLOURS, otherwise the colour."""
    return KEPT_COLOURS.index(colour) if picture.mode == "P" else colour


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitting(text: str, font, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("\u2026 ") + "\u2026" if len(text) > 2 else ""
    return text


def _draw_box(draw: ImageDraw.ImageDraw, frame, colour, shade, dashed: bool) -> None:
    x1, y1, x2, y2 = frame
    if not dashed:
        draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=shade, width=5)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=colour, width=3)
        return
    for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        steps = max(1, int(length // 6)) | 1  # odd: corners are drawn
        points = np.linspace(start, end, steps + 1)
        draw.line((*start, *end), fill=shade, width=3)
        for index in range(0, steps, 2):
            draw.line((*points[index], *points[index + 1]), fill=colour, width=3)


def _draw_tag(picture: Image.Image, frame, frames, text: str, colour: str, taken: list) -> None:
    """Writes `text` at the position around the box, inside the picture, with the least overlap with earlier texts."""
    font, size = _font(13), picture.size
    width, height = math.ceil(font.getlength(text)) + 9, 17
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
    area = width * height

    def clutter(place) -> float:  # covering another text is worst, then the box itself, then other boxes
        texts = sum(_overlap(place, other) for other in taken)
        return (8 * texts + 2 * _overlap(place, frame) + sum(_overlap(place, other) for other in frames)) / area

    spot = min(inside, key=clutter)  # the first of the best
    if sum(_overlap(spot, other) for other in taken) > 0.3 * area:
        return  # no room for a text
    taken.append(spot)
    tag = Image.new("L", (width, height), 0)
    ImageDraw.Draw(tag).text((6, 0.5), text, fill=255, font=font)
    greys = np.rint(np.asarray(tag) * ((GREYS - 1) / 255)).astype(np.uint8) + np.uint8(len(KEPT_COLOURS) - GREYS)
    greys[:, :4] = KEPT_COLOURS.index(colour)
    picture.paste(Image.frombytes("P", (width, height), greys.tobytes()), (round(spot[0]), round(spot[1])))


def _overlap(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
