"""Instance masks of a data set in a few flat arrays: polygons as coordinates, run lengths as COCO's strings.

All masks of an annotation file are checked here first, because the C code of pycocotools does not validate its input.
"""

from __future__ import annotations

from array import array

import numpy as np

NONE, POLYGONS, RUNS = 0, 1, 2


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


class SegmentationWriter:
    """Collects the masks of successive annotations; `finish` returns the arrays."""

    def __init__(self):
        self._kind = array("B")
        self._spans = array("q", [0])  # ranges of polygons, or of bytes of the run-length strings, depending on kind
        self._polygon_ends = array("q", [0])
        self._coordinates = array("f")
        self._bytes = bytearray()

    def check(self, segmentation, height: int, width: int):
        """The checked mask, as an argument for `add`. Raises: ValueError naming the fault."""
        if isinstance(segmentation, list):
            return check_polygons(segmentation, height, width)
        if isinstance(segmentation, dict):
            return pack_runs(segmentation, height, width)
        raise ValueError(f"it must be a list of polygons or a run-length mask, got {segmentation!r:.60}")

    def add(self, checked: list[np.ndarray] | bytes | None) -> None:
        """Appends the mask of the next annotation; None if it has no mask."""
        if checked is None:
            self._kind.append(NONE)
            self._spans.append(0)
        elif isinstance(checked, bytes):
            self._kind.append(RUNS)
            self._bytes += checked
            self._spans.append(len(self._bytes))
        else:
            self._kind.append(POLYGONS)
            for points in checked:
                self._coordinates.extend(points.tolist())
                self._polygon_ends.append(len(self._coordinates))
            self._spans.append(len(self._polygon_ends) - 1)

    def finish(self) -> Segmentations:
        kind = np.array(self._kind, np.uint8)
        ends = np.array(self._spans, np.int64)[1:]
        starts = np.zeros_like(ends)
        for value in (POLYGONS, RUNS):  # each kind has its own store: a span starts at the end of the previous one
            rows = np.flatnonzero(kind == value)
            starts[rows[1:]] = ends[rows[:-1]]
        spans = np.stack([starts, ends], 1)
        polygon_ends = np.array(self._polygon_ends, np.int64)
        coordinates = np.array(self._coordinates, np.float32)
        return Segmentations(kind, spans, polygon_ends, coordinates, np.frombuffer(bytes(self._bytes), np.uint8))


class Segmentations:
    """Masks of K annotations in flat arrays, decoded one by one on demand."""

    def __init__(self, kind, spans, polygon_ends, coordinates, run_bytes):
        self.kind = kind  # [K] uint8: NONE, POLYGONS or RUNS
        self.spans = spans  # [K, 2] int64: polygons, or bytes
        self.polygon_ends = polygon_ends  # [P + 1] int64 into coordinates
        self.coordinates = coordinates  # float32 x, y, x, y ...
        self.run_bytes = run_bytes  # uint8

    def take(self, rows: np.ndarray) -> Segmentations:
        """The masks of the given rows; the stores are shared, only kind and spans are indexed."""
        return Segmentations(self.kind[rows], self.spans[rows], self.polygon_ends, self.coordinates, self.run_bytes)

    def decode(self, row: int, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
        """The mask of one annotation, rescaled to `size`.

        Args:
            row: index of the annotation.
            height, width: size of the image.
            size: (height, width) of the result; polygons are scaled before they are drawn, run-length masks sampled.
        Returns: bool [size].
        """
        from pycocotools import mask as coco_mask

        start, end = self.spans[row]
        if self.kind[row] == POLYGONS:
            scale = np.array([size[1] / width, size[0] / height])
            polygons = []
            for p in range(start, end):
                points = self.coordinates[self.polygon_ends[p] : self.polygon_ends[p + 1]].reshape(-1, 2) * scale
                polygons.append(points.ravel().tolist())
            return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)
        if self.kind[row] == RUNS:
            runs = {"size": [height, width], "counts": self.run_bytes[start:end].tobytes()}
            mask = coco_mask.decode(runs).astype(bool)
            if size == (height, width):
                return mask
            y = ((np.arange(size[0]) + 0.5) * (height / size[0])).astype(np.int64)
            x = ((np.arange(size[1]) + 0.5) * (width / size[1])).astype(np.int64)
            return mask[y[:, None], x]
        return np.zeros(size, bool)
