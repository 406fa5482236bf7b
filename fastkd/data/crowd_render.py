"""Draws one crowd: groups of people on a plane in perspective, from one random generator.

As in scenes_render, the layout is planned first, and people who would be hidden too much are not painted, so that every
person in the picture is annotated. A distant throng, in which people cannot be told apart, is a region to ignore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fastkd.data.scenes_render import finish_picture, paint_background

SUPERSAMPLING = 3
THRONG = (9.0, 12.0)  # pixels: heights of the people of a throng
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CrowdStyle:
    """Difficulty of the generated crowds.

    Args:
        sizes: (width, height) of the pictures, drawn uniformly.
        max_people: most people in one picture, >= 1.
        heights: smallest and largest height of a person, pixels, in a picture 128 pixels high.
        crowding: density of a group, 0 (apart) .. 1 (mostly hidden).
        min_visible: people with a smaller visible fraction are left out, in (0, 1].
        throngs: probability of a region to ignore.
        clutter: mean number of objects other than people.
        noise: standard deviation of the sensor noise, grey levels of 255.
        contrast: scales the spread of the background's colours.
        blur: largest radius of the blur in pixels.
        empty: fraction of pictures without people.
    """

    sizes: tuple[tuple[int, int], ...] = ((128, 128), (160, 128), (176, 112))
    max_people: int = 14
    heights: tuple[float, float] = (20.0, 88.0)
    crowding: float = 0.55
    min_visible: float = 0.2
    throngs: float = 0.2
    clutter: float = 2.0
    noise: float = 5.0
    contrast: float = 1.0
    blur: float = 0.5
    empty: float = 0.03

    def __post_init__(self):
        if not self.sizes or any(len(s) != 2 or min(s) < 64 or max(s) > 4096 for s in self.sizes):
            raise ValueError(f"CrowdStyle: sizes must be (width, height) pairs of 64..4096 pixels, got {self.sizes}")
        for name, low, high in (("max_people", 1, 100), ("crowding", 0, 1), ("min_visible", 0.05, 1),
                                ("throngs", 0, 1), ("clutter", 0, 50), ("noise", 0, 128), ("contrast", 0.05, 2),
                                ("blur", 0, 8), ("empty", 0, 1)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"CrowdStyle: {name} must be in [{low}, {high}], got {getattr(self, name)}")
        if len(self.heights) != 2 or not 12 <= self.heights[0] <= self.heights[1] <= 128:
            raise ValueError(f"CrowdStyle: heights must be (smallest, largest) in [12, 128], got {self.heights}")


@dataclass
class Figure:
    """A planned person or other object: colours [h, w, 3] and coverage [h, w], with the top left corner at (x, y).

    full and head are boxes xyxy in pixels of the picture, not clipped to it; None for other objects.
    """

    colours: np.ndarray
    alpha: np.ndarray
    x: int
    y: int
    full: Box | None = None
    head: Box | None = None


@dataclass(frozen=True)
class Person:
    """An annotated person: boxes xyxy in pixels; the visible box is clipped to the picture."""

    full: Box
    visible: Box
    head: Box
    occluded: bool


def _draw_parts(parts: list[tuple[str, list, tuple[int, ...]]], width: float, height: float):
    """Colours [h, w, 3] and coverage [h, w] of polygons and ellipses in a frame of width x height pixels."""
    size = (max(1, math.ceil(width)), max(1, math.ceil(height)))
    large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    picture, mask = Image.new("RGB", large, parts[0][2]), Image.new("L", large, 0)
    for kind, points, colour in parts:
        scaled = (np.array(points) * SUPERSAMPLING).ravel().tolist()
        for canvas, fill in ((picture, colour), (mask, 255)):
            draw = ImageDraw.Draw(canvas)
            (draw.ellipse if kind == "ellipse" else draw.polygon)(scaled, fill=fill)
    alpha = np.asarray(mask.reduce(SUPERSAMPLING), np.float32) / 255
    return np.asarray(picture.reduce(SUPERSAMPLING), np.float32), alpha


def _colour(rng: np.random.Generator, low: float = 20, high: float = 235) -> tuple[int, ...]:
    return tuple(int(v) for v in rng.uniform(low, high, 3))


def _limb(start: tuple[float, float], end: tuple[float, float], thick: float) -> list[tuple[float, float]]:
    return [
        (start[0] - thick, start[1]),
        (start[0] + thick, start[1]),
        (end[0] + thick, end[1]),
        (end[0] - thick, end[1]),
    ]


def person(rng: np.random.Generator, centre: float, feet: float, height: float) -> Figure:
    """A person with the feet at (centre, feet): legs, arms, trunk, head and hair."""
    h, middle, radius = height, 0.3 * height, height * rng.uniform(0.075, 0.09)
    shirt, trousers, hair = _colour(rng), _colour(rng), _colour(rng, 10, 120)
    tone = rng.uniform(0.45, 1.0)
    skin = tuple(int(v * tone) for v in (236, 196, 168))
    lean, stride, shoulder = rng.uniform(-0.03, 0.03) * h, rng.uniform(0.02, 0.1) * h, rng.uniform(0.1, 0.13) * h
    neck, hip = 1.9 * radius, 0.52 * h
    head = (middle + lean - radius, 0.0, middle + lean + radius, 2.2 * radius)
    parts: list[tuple[str, list, tuple[int, ...]]] = []
    for side in (-1, 1):
        foot = (middle + side * stride + rng.uniform(-0.02, 0.02) * h, 0.995 * h)
        parts.append(("polygon", _limb((middle + side * 0.05 * h, hip - 2), foot, 0.045 * h), trousers))
        hand = (middle + side * rng.uniform(0.12, 0.24) * h, rng.uniform(0.4, 0.56) * h)
        parts.append(
            ("polygon", _limb((middle + lean + side * 0.9 * shoulder, neck + 0.04 * h), hand, 0.03 * h), shirt)
        )
    trunk = [(middle + lean - shoulder, neck), (middle + lean + shoulder, neck), (middle + 0.095 * h, hip + 0.03 * h),
             (middle - 0.095 * h, hip + 0.03 * h)]  # fmt: skip
    parts.append(("polygon", trunk, shirt))
    if rng.random() < 0.4:  # a band across the shirt
        band = neck + rng.uniform(0.08, 0.2) * h
        parts.append(("polygon", _limb((middle, band), (middle, band + 0.05 * h), 0.095 * h), _colour(rng)))
    parts.append(("ellipse", [head[:2], head[2:]], hair))
    parts.append(("ellipse", [(head[0] + 0.2 * radius, 0.55 * radius), (head[2] - 0.2 * radius, head[3])], skin))
    colours, alpha = _draw_parts(parts, 0.6 * h, h)
    x, y = round(centre - middle), round(feet - h)
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    full = (float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1))
    return Figure(colours, alpha, x, y, full, (x + head[0], full[1], x + head[2], y + head[3]))


def _thing(rng: np.random.Generator, centre: float, foot: float, height: float) -> Figure:
    """An object that is not a person: a lamp, a bush, a board or a bin."""
    h, kind = height, int(rng.integers(4))
    width = h * (0.3, 1.0, 0.7, 0.45)[kind]
    middle, colour = width / 2, _colour(rng)
    if kind == 0:
        parts = [("polygon", _limb((middle, 0.1 * h), (middle, h), 0.02 * h + 0.5), colour),
                 ("ellipse", [(0.02 * h, 0), (width - 0.02 * h, 0.16 * h)], _colour(rng, 150, 250))]  # fmt: skip
    elif kind == 1:
        parts = [("ellipse", [(0, 0.2 * h), (width, h)], (40, int(rng.uniform(80, 160)), 50))]
    elif kind == 2:
        parts = [("polygon", _limb((middle, 0.4 * h), (middle, h), 0.03 * h), colour),
                 ("polygon", [(0, 0), (width, 0), (width, 0.5 * h), (0, 0.5 * h)], _colour(rng))]  # fmt: skip
    else:
        parts = [("polygon", [(0, 0), (width, 0), (0.85 * width, h), (0.15 * width, h)], colour)]
    colours, alpha = _draw_parts(parts, width, h)
    return Figure(colours, alpha, round(centre - middle), round(foot - h))


def _throng(rng: np.random.Generator, width: int, horizon: float) -> tuple[list[Figure], Box]:
    """Small distant people side by side, and the box around them."""
    span, count = rng.uniform(0.25, 0.5) * width, int(rng.integers(12, 22))
    left = rng.uniform(0, width - span)
    feet = horizon + THRONG[1] + rng.uniform(0, 3, count)
    places = left + span * rng.random(count)
    found = [person(rng, x, y, rng.uniform(*THRONG)) for x, y in zip(places, np.sort(feet))]
    boxes = np.array([figure.full for figure in found])
    left, top = boxes[:, :2].min(0).tolist()
    right, bottom = boxes[:, 2:].max(0).tolist()
    for figure in found:
        figure.full = figure.head = None  # not annotated as people
    return found, (left, top, right, bottom)


def _plan(rng: np.random.Generator, style: CrowdStyle, width: int, height: int) -> tuple[list[Figure], list[Box]]:
    """All figures from far to near, and the regions to ignore."""
    unit = height / 128
    horizon, slope = rng.uniform(0.08, 0.3) * height, rng.uniform(0.55, 0.9)
    figures, feet, regions = [], [], []
    if rng.random() < style.throngs:
        far, region = _throng(rng, width, horizon)
        figures, feet, regions = list(far), [horizon] * len(far), [region]
    count = 0 if rng.random() < style.empty else 1 + int(min(rng.geometric(0.16) - 1, style.max_people - 1))
    while count > 0:
        group = min(count, 1 + int(rng.poisson(2.0)))
        count -= group
        tall = float(np.exp(rng.uniform(*np.log(style.heights)))) * unit
        base, x = horizon + tall / slope, rng.uniform(0.05, 0.95) * width
        for _ in range(group):
            own = tall * math.exp(rng.normal(0, 0.06))
            figures.append(person(rng, x, base, own))
            feet.append(base)
            x += rng.choice((-1, 1)) * own * (0.75 - 0.6 * style.crowding) * rng.uniform(0.5, 1.5)
            base += rng.normal(0, 0.08) * own
    for _ in range(int(rng.poisson(style.clutter))):
        foot = rng.uniform(horizon + 10, 1.1 * height)
        figures.append(
            _thing(rng, rng.uniform(0, width), foot, max(8.0, slope * (foot - horizon) * rng.uniform(0.3, 1.0)))
        )
        feet.append(foot)
    order = np.argsort(np.array(feet), kind="stable")
    return [figures[i] for i in order], regions


def _part(figure: Figure, width: int, height: int) -> tuple[slice, slice, slice, slice] | None:
    """Slices of a figure's visible rectangle, in the picture and in the figure's arrays; None if it is outside."""
    h, w = figure.alpha.shape
    top, left = max(figure.y, 0), max(figure.x, 0)
    bottom, right = min(figure.y + h, height), min(figure.x + w, width)
    if bottom <= top or right <= left:
        return None
    own = slice(top - figure.y, bottom - figure.y), slice(left - figure.x, right - figure.x)
    return slice(top, bottom), slice(left, right), *own


def _visible_index(figures: list[Figure], width: int, height: int) -> np.ndarray:
    """Index of the figure visible at each pixel: [height, width] int16, -1 for none."""
    owner = np.full((height, width), -1, np.int16)
    for k, figure in enumerate(figures):
        part = _part(figure, width, height)
        if part:
            owner[part[0], part[1]][figure.alpha[part[2], part[3]] > 0.5] = k
    return owner


def _visible_fraction(figure: Figure, mask: np.ndarray) -> float:
    """Visible fraction of a figure, including its parts outside the picture."""
    return float(mask.sum()) / max(float((figure.alpha > 0.5).sum()), 1.0)


def _visible_box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def render_crowd(rng: np.random.Generator, style: CrowdStyle) -> tuple[np.ndarray, list[Person], list[Box]]:
    """Draws one crowd.

    Args:
        rng: the only source of randomness.
        style: difficulty.
    Returns: picture [H, W, 3] uint8, the people, boxes xyxy of the regions to ignore.
    """
    width, height = style.sizes[int(rng.integers(len(style.sizes)))]
    figures, regions = _plan(rng, style, width, height)
    owner = _visible_index(figures, width, height)
    kept = [f for k, f in enumerate(figures) if f.full is None or _visible_fraction(f, owner == k) >= style.min_visible]
    if len(kept) < len(figures):  # hidden figures removed: the others become more visible
        figures, owner = kept, _visible_index(kept, width, height)
    canvas = paint_background(rng, style, width, height)
    for figure in figures:
        part = _part(figure, width, height)
        if part:
            area, alpha = canvas[part[0], part[1]], figure.alpha[part[2], part[3]][..., None]
            area += alpha * (figure.colours[part[2], part[3]] - area)
    people = []
    for k, figure in enumerate(figures):
        if figure.full is not None and figure.head is not None:
            mask = owner == k
            people.append(Person(figure.full, _visible_box(mask), figure.head, _visible_fraction(figure, mask) < 0.9))
    return finish_picture(rng, canvas, style), people, regions
