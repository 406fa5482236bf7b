"""Checks of the masks in annotation files: polygons and run lengths.

All masks are checked here before pycocotools reads them, because its C code does not validate its input.
"""

from __future__ import annotations

import numpy as np


def decode_run_lengths(text: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed string: int64 [n].

    Each number is written in groups of 5 bits, lowest first, as chr(48 + bits + 32 * more). From the fourth number on,
    the difference to the number two positions before is written.
    Raises: ValueError if the string is not in this format.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("counts is not a run-length string")
    last = (codes & 32) == 0
    number = np.concatenate([[0], np.cumsum(last)[:-1]])  # index of the number of each group
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(codes.size) - starts[number]
    if place.max() > 7:
        raise ValueError("counts holds a number of more than 40 bits")
    values = np.bincount(number, weights=(codes & 31) << (5 * place)).astype(np.int64)
    ends = np.flatnonzero(last)
    bits = 5 * (place[ends] + 1)
    values -= np.where(codes[ends] & 16, np.int64(1) << bits, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _check_runs(counts: np.ndarray, height: int, width: int) -> None:
    if counts.size == 0 or counts.min() < 0 or counts.max() > height * width or counts.sum() != height * width:
        raise ValueError(f"run lengths must be >= 0 and add up to {height} * {width} pixels")


def pack_runs(segmentation: dict, height: int, width: int) -> bytes:
    """The checked compressed string of a run-length mask, given as a string or a list. Raises: ValueError."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"size must be that of the image, [{height}, {width}], got {size!r:.60}")
    if isinstance(counts, str):
        packed = counts.encode("latin-1", "replace")
        _check_runs(decode_run_lengths(packed), height, width)
        return packed
    if not isinstance(counts, list) or not all(type(v) is int for v in counts):
        raise ValueError(f"counts must be a string or a list of integers, got {counts!r:.60}")
    if any(not 0 <= v <= height * width for v in counts) or sum(counts) != height * width:
        raise ValueError(f"run lengths must be >= 0 and add up to {height} * {width} pixels")
    from pycocotools import mask as coco_mask  # not needed for training on boxes

    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]


def check_polygons(polygons: list, height: int, width: int) -> list[np.ndarray]:
    """Polygons as float64 arrays [2 n], checked. Raises: ValueError."""
    if not polygons:
        raise ValueError("it has no polygon")
    arrays = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must be a list of an even number >= 6 of numbers, got {polygon!r:.60}")
        if not all(type(v) in (int, float) and abs(v) <= 1e6 for v in polygon):  # also rejects NaN
            raise ValueError(f"a polygon must hold numbers of pixels, got {polygon!r:.60}")
        points = np.asarray(polygon, np.float64)
        x, y = points[0::2], points[1::2]
        if x.min() < -width or x.max() > 2 * width or y.min() < -height or y.max() > 2 * height:
            raise ValueError("a polygon lies far outside the image")  # drawing needs memory proportional to its length
        arrays.append(points)
    return arrays
