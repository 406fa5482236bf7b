"""Draws one scene: shapes, textures, placement, occlusion, lighting and noise, from one random generator.

The layout of a scene is planned first, including the visible part of every item, and then painted. Objects that would
be hidden too much are not painted, so that every object in the picture is annotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 4  # outlines are drawn larger by this factor and averaged down
TEXTURES = ("plain", "stripes", "checker", "dots", "gradient")
SMALLEST_PERIOD = 3.2  # pixels; finer textures would be lost in sampling


class PictureStyle(Protocol):
    """The parameters of a picture's background, lighting, blur and noise; see SceneStyle and CrowdStyle."""

    @property
    def noise(self) -> float: ...

    @property
    def clutter(self) -> float: ...

    @property
    def contrast(self) -> float: ...

    @property
    def blur(self) -> float: ...


@dataclass(frozen=True)
class SceneStyle:
    """Difficulty of the generated scenes.

    Args:
        sizes: (width, height) of the pictures, drawn uniformly.
        max_objects: maximum number of objects in one picture, >= 1.
        max_classes: maximum number of classes in one picture, >= 1; 10 are all.
        smallest: smallest object side, pixels.
        typical: smallest and largest side of 83 % of the objects, pixels of a 128-pixel picture; the other sides range
            down to `smallest` and up to more than half the picture.
        rotation: maximum rotation of a shape and its texture from upright, radians, in [0, pi].
        noise: standard deviation of the sensor noise, grey levels of 255; scaled by 0.4..1.6 in each picture.
        clutter: mean number of distractors (shapes of no class) in a picture.
        occlusion: probability that an object is placed so that it overlaps an earlier one.
        min_visible: objects with a smaller visible fraction of their area are left out, in (0, 1].
        contrast: factor on the colour distance between objects, textures and background; default 1.
        blur: maximum radius of the blur in pixels; half of the pictures are blurred.
        empty: fraction of pictures without objects.
    """

    sizes: tuple[tuple[int, int], ...] = ((128, 128), (160, 96), (96, 160))
    max_objects: int = 9
    max_classes: int = 10
    smallest: float = 8.0
    typical: tuple[float, float] = (18.0, 64.0)
    rotation: float = 0.4
    noise: float = 5.0
    clutter: float = 2.5
    occlusion: float = 0.2
    min_visible: float = 0.35
    contrast: float = 1.4
    blur: float = 0.5
    empty: float = 0.03

    def __post_init__(self):
        if not self.sizes or any(len(s) != 2 or min(s) < 32 or max(s) > 4096 for s in self.sizes):
            raise ValueError(f"SceneStyle: sizes must be (width, height) pairs of 32..4096 pixels, got {self.sizes}")
        for name, low, high in (("noise", 0, 128), ("clutter", 0, 50), ("occlusion", 0, 1), ("min_visible", 0.05, 1),
                                ("contrast", 0.05, 2), ("blur", 0, 8), ("empty", 0, 1), ("max_objects", 1, 50),
                                ("max_classes", 1, 10),
                                ("smallest", 6, 64), ("rotation", 0, math.pi)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"SceneStyle: {name} must be in [{low}, {high}], got {getattr(self, name)}")
        if len(self.typical) != 2 or not 6 <= self.typical[0] <= self.typical[1] <= 96:
            raise ValueError(f"SceneStyle: typical must be (smallest, largest) in [6, 96], got {self.typical}")


# Theme: large objects, one or two classes in a picture; labels say much about it (LGD, docs/results/findings.md).
SCENE_STYLES = {
    "scenes": SceneStyle(),
    "theme": SceneStyle(smallest=28.0, typical=(28.0, 90.0), max_objects=6, max_classes=2),
}


def _regular(corners: int, inner: float | None = None, turn: float = 0.0) -> np.ndarray:
    """Corners of a regular polygon of radius 1, or of a star with that inner radius: [n, 2]."""
    count = corners if inner is None else 2 * corners
    angle = np.arange(count) * (2 * math.pi / count) + turn
    radius = np.ones(count) if inner is None else np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


_DISC = _regular(36)
_ARM = 0.3
# name -> (outline, hole or None), in a frame where the shape fills about [-1, 1]^2
SHAPES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "disc": (_DISC, None),
    "square": (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88, None),
    "triangle": (_regular(3, turn=-math.pi / 2) * 1.1, None),
    "ring": (_DISC, _DISC * 0.55),
    "star": (_regular(5, inner=0.45, turn=-math.pi / 2), None),
    "cross": (
        np.array([[-_ARM, -1], [_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM],
                  [_ARM, 1], [-_ARM, 1], [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM]]),
        None,
    ),
    "crescent": (_DISC, _DISC * 0.85 + np.array([0.5, 0.0])),
    "hexagon": (_regular(6), None),
    "half_disc": (_DISC[:19] - np.array([0, 0.5]), None),
    "bar": (np.array([[-1, -0.25], [1, -0.25], [1, 0.25], [-1, 0.25]]), None),
    "corner": (np.array([[-0.9, -0.9], [-0.3, -0.9], [-0.3, 0.3], [0.9, 0.3], [0.9, 0.9], [-0.9, 0.9]]), None),
    "burst": (_regular(9, inner=0.6), None),
}  # fmt: skip

ANY = TEXTURES
# class name -> (category id on disk, shape, textures it may have). Ids are sparse on purpose, as COCO's are.
SCENE_KINDS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "striped disc": (3, "disc", ("stripes",)),
    "dotted disc": (7, "disc", ("dots",)),
    "striped square": (11, "square", ("stripes",)),
    "checkered square": (18, "square", ("checker",)),
    "plain triangle": (25, "triangle", ("plain",)),
    "dotted triangle": (31, "triangle", ("dots",)),
    "ring": (44, "ring", ANY),
    "star": (52, "star", ANY),
    "cross": (67, "cross", ANY),
    "crescent": (90, "crescent", ANY),
}
# distractors: shapes of no class, and shapes of a class with a texture that no class has
DISTRACTORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hexagon", ANY),
    ("half_disc", ANY),
    ("bar", ANY),
    ("corner", ANY),
    ("burst", ANY),
    ("disc", ("plain", "gradient")),
    ("square", ("plain", "gradient")),
    ("triangle", ("stripes",)),
)


@dataclass
class _Item:
    """One planned shape: label -1 is a distractor. alpha [h, w] in [0, 1] lies at (x0, y0) of the picture."""

    label: int
    texture: str
    centre: tuple[float, float]
    radii: tuple[float, float]
    angle: float
    alpha: np.ndarray
    x0: int
    y0: int
    area: float  # of the whole shape, including its parts outside the picture


def _outline(item_shape: str, centre, radii, angle: float, width: int, height: int):
    """Coverage of a shape inside the picture: (alpha [h, w] float32, x0, y0, total area in pixels); None if outside."""
    outer, hole = SHAPES[item_shape]
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    scale = np.array(radii)
    points = (outer * scale) @ turn + np.array(centre)
    x0, y0 = (int(v) for v in np.floor(points.min(0)))
    x1, y1 = (int(v) + 1 for v in np.ceil(points.max(0)))
    canvas = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING), 0)
    draw = ImageDraw.Draw(canvas)
    origin = np.array([x0, y0])
    draw.polygon(((points - origin) * SUPERSAMPLING).ravel().tolist(), fill=255)
    if hole is not None:
        inside = (hole * scale) @ turn + np.array(centre)
        draw.polygon(((inside - origin) * SUPERSAMPLING).ravel().tolist(), fill=0)
    alpha = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) * (1 / 255)
    area = float((alpha > 0.5).sum())
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x1, width), min(y1, height)
    if right <= left or bottom <= top or area == 0:
        return None
    return alpha[top - y0 : bottom - y0, left - x0 : right - x0], left, top, area


def _object_side(rng: np.random.Generator, style: SceneStyle, width: int, height: int) -> float:
    """Side of an object, pixels: mostly from `style.typical`, some smaller, a few up to half the picture."""
    unit = math.sqrt(width * height) / 128
    draw = rng.random()
    if draw < 0.10:
        low, high = style.smallest, style.typical[0] * unit
    elif draw < 0.93:
        low, high = style.typical[0] * unit, style.typical[1] * unit
    else:
        low, high = 56 * unit, 88 * unit
    low, high = max(low, style.smallest), max(high, style.smallest)
    return min(math.exp(rng.uniform(math.log(low), math.log(high))), 0.8 * min(width, height))


def _place(rng, style: SceneStyle, width: int, height: int, side: float, placed: list[tuple[float, float, float]]):
    """Centre of a new object: overlapping an earlier one (occlusion), or apart from all if a few attempts succeed."""
    if placed and rng.random() < style.occlusion:
        x, y, other = placed[int(rng.integers(len(placed)))]
        angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.5) * (side + other)
        x, y = x + reach * math.cos(angle), y + reach * math.sin(angle)
        return float(np.clip(x, 0, width)), float(np.clip(y, 0, height))
    inset = 0.42 * side  # a few objects extend beyond the border
    best, best_gap = (width / 2, height / 2), -math.inf
    for _ in range(6):
        x = rng.uniform(min(inset, width / 2), max(width - inset, width / 2))
        y = rng.uniform(min(inset, height / 2), max(height - inset, height / 2))
        gap = min((math.hypot(x - a, y - b) - 0.5 * (side + s) for a, b, s in placed), default=math.inf)
        if gap > best_gap:
            best, best_gap = (x, y), gap
        if gap > 0:
            break
    return best


def _make_item(
    rng, style: SceneStyle, label: int, shape: str, textures, side: float, centre, width: int, height: int
) -> _Item | None:
    aspect = math.exp(rng.uniform(-0.25, 0.25))
    radii = (0.5 * side * math.sqrt(aspect), 0.5 * side / math.sqrt(aspect))
    angle = rng.uniform(-style.rotation, style.rotation)
    texture = textures[int(rng.integers(len(textures)))]
    outline = _outline(shape, centre, radii, angle, width, height)
    if outline is None:
        return None
    alpha, x0, y0, area = outline
    return _Item(label, texture, centre, radii, angle, alpha, x0, y0, area)


def _theme(rng: np.random.Generator, style: SceneStyle, classes: int) -> list[int]:
    """The classes of a picture. Where all may occur nothing is drawn: such pictures are as in the first version."""
    if style.max_classes >= classes:
        return list(range(classes))
    return rng.permutation(classes)[: int(rng.integers(1, style.max_classes + 1))].tolist()


def _plan(rng: np.random.Generator, style: SceneStyle, width: int, height: int) -> list[_Item]:
    """All shapes of a picture from back to front."""
    count = 0
    if rng.random() >= style.empty:
        count = 1 + int(min(rng.geometric(0.22) - 1, style.max_objects - 1))
    kinds = list(SCENE_KINDS.values())
    labels = _theme(rng, style, len(kinds))
    placed: list[tuple[float, float, float]] = []
    items: list[_Item | None] = []  # None: the shape is outside the picture
    for _ in range(count):
        label = labels[int(rng.integers(len(labels)))]
        side = _object_side(rng, style, width, height)
        centre = _place(rng, style, width, height, side, placed)
        placed.append((*centre, side))
        _, shape, textures = kinds[label]
        items.append(_make_item(rng, style, label, shape, textures, side, centre, width, height))
    for _ in range(int(rng.poisson(style.clutter))):
        shape, textures = DISTRACTORS[int(rng.integers(len(DISTRACTORS)))]
        side = _object_side(rng, style, width, height) * 0.7
        centre = (rng.uniform(0, width), rng.uniform(0, height))
        item = _make_item(rng, style, -1, shape, textures, max(side, 6.0), centre, width, height)
        # three of four distractors lie behind the objects, the others anywhere
        items.insert(0 if rng.random() < 0.75 else int(rng.integers(len(items) + 1)), item)
    return [item for item in items if item is not None]


def _visible_index(items: list[_Item], width: int, height: int) -> np.ndarray:
    """Index of the item visible at each pixel: [height, width] int16, -1 for none."""
    owner = np.full((height, width), -1, np.int16)
    for k, item in enumerate(items):
        h, w = item.alpha.shape
        owner[item.y0 : item.y0 + h, item.x0 : item.x0 + w][item.alpha > 0.5] = k
    return owner


def _visible_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the true pixels, half open; the mask must not be empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _enough_visible(item: _Item, mask: np.ndarray, style: SceneStyle) -> bool:
    seen = int(mask.sum())
    if seen < style.min_visible * item.area or seen < 6:
        return False
    x0, y0, x1, y1 = _visible_box(mask)
    return min(x1 - x0, y1 - y0) >= 4 and max(x1 - x0, y1 - y0) >= 6


def _texture(rng: np.random.Generator, item: _Item) -> np.ndarray | None:
    """Blend of the item's two colours, [h, w] in [0, 1]; None for a plain item."""
    if item.texture == "plain":
        return None
    h, w = item.alpha.shape
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    x = np.arange(w, dtype=np.float32)[None, :] + np.float32(item.x0 + 0.5 - item.centre[0])
    y = np.arange(h, dtype=np.float32)[:, None] + np.float32(item.y0 + 0.5 - item.centre[1])
    u = x * cos + y * sin  # pixels along the item's rotated axes
    v = y * cos - x * sin
    side = 2 * min(item.radii)
    if item.texture == "gradient":
        return np.clip(0.5 + u / side, 0, 1)
    period = max(side / rng.uniform(2.6, 4.4), SMALLEST_PERIOD)
    wave = np.float32(2 * math.pi / period)
    phase = rng.uniform(0, 2 * math.pi, 2)
    steep = np.float32(0.16 * period)  # edges about one pixel wide at any period
    if item.texture == "stripes":
        value = np.sin(u * wave + phase[0])
    elif item.texture == "checker":
        value = np.sin(u * wave * 0.7 + phase[0]) * np.sin(v * wave * 0.7 + phase[1]) * 1.6
    else:  # dots
        value = np.cos(u * wave + phase[0]) + np.cos(v * wave + phase[1]) - 0.6
    return np.clip(0.5 + steep * value, 0, 1)


def _colours(rng: np.random.Generator, style: SceneStyle, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of an item, independent of its class: one contrasts with the ground, the other with the first."""
    pair = []
    start = ground
    for low, high in ((30.0, 110.0), (50.0, 120.0)):
        direction = rng.normal(size=3)
        direction += np.sign(direction.sum()) * 0.6  # always some luminance contrast
        direction /= np.abs(direction).max()
        if rng.random() < abs(float(start.mean()) - 127) / 127:  # towards mid-grey if it is too bright or dark
            direction *= np.sign(127 - start.mean()) * np.sign(direction.sum())
        start = np.clip(start + direction * rng.uniform(low, high) * style.contrast, 8, 247)
        pair.append(start.astype(np.float32))
    return pair[0], pair[1]


def paint_background(rng: np.random.Generator, style: PictureStyle, width: int, height: int) -> np.ndarray:
    """Smooth colour gradients, finer patches and a few thin lines: [height, width, 3] float32."""
    base = rng.uniform(50, 205, 3)
    cells = rng.normal(0, 22, (int(rng.integers(2, 6)), int(rng.integers(2, 6)), 3)) * style.contrast + base
    clouds = Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(clouds)
    for _ in range(int(rng.poisson(style.clutter / 3))):
        colour = tuple(int(v) for v in np.clip(base + rng.normal(0, 40, 3) * style.contrast, 0, 255))
        ends = (rng.random(4) * [width, height, width, height]).tolist()
        draw.line(ends, fill=colour, width=int(rng.integers(1, 4)))
    grain = rng.normal(128, 30, (height // 4, width // 4))
    mottle = Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    strength = rng.uniform(0, 0.5) * style.contrast
    return np.asarray(clouds, np.float32) + (np.asarray(mottle, np.float32)[..., None] - 128) * np.float32(strength)


def _paint(rng: np.random.Generator, canvas: np.ndarray, item: _Item, style: SceneStyle) -> None:
    h, w = item.alpha.shape
    area = canvas[item.y0 : item.y0 + h, item.x0 : item.x0 + w]
    first, second = _colours(rng, style, area[h // 2, w // 2].astype(np.float64))
    blend = _texture(rng, item)
    colour = first if blend is None else first + blend[..., None] * (second - first)
    area += item.alpha[..., None] * (colour - area)


def finish_picture(rng: np.random.Generator, canvas: np.ndarray, style: PictureStyle) -> np.ndarray:
    """Lighting, blur and noise: uint8 [height, width, 3]."""
    height, width = canvas.shape[:2]
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.45)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * np.float32(math.cos(angle) * slope)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(math.sin(angle) * slope)
    canvas = canvas * ((x + y + 1) * np.float32(rng.uniform(0.7, 1.15)))[..., None]
    if rng.random() < 0.5 and style.blur > 0:
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        canvas = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1) * style.blur)), np.float32)
    level = np.float32(style.noise * rng.uniform(0.4, 1.6))
    canvas = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * level
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render_scene(rng: np.random.Generator, style: SceneStyle):
    """Draws one scene.

    Args:
        rng: the only source of randomness.
        style: difficulty.
    Returns: picture [H, W, 3] uint8, labels (list of n ints, index into SCENE_KINDS), visible masks [n, H, W] bool.
    """
    width, height = style.sizes[int(rng.integers(len(style.sizes)))]
    items = _plan(rng, style, width, height)
    owner = _visible_index(items, width, height)
    kept = [k for k, item in enumerate(items) if item.label < 0 or _enough_visible(item, owner == k, style)]
    if len(kept) < len(items):  # hidden items removed: the others become more visible
        items = [items[k] for k in kept]
        owner = _visible_index(items, width, height)
    canvas = paint_background(rng, style, width, height)
    for item in items:
        _paint(rng, canvas, item, style)
    objects = [k for k, item in enumerate(items) if item.label >= 0]
    masks = np.stack([owner == k for k in objects]) if objects else np.zeros((0, height, width), bool)
    return finish_picture(rng, canvas, style), [items[k].label for k in objects], masks
