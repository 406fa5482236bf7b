"""Instance masks of a data set in a few flat arrays: polygons as coordinates, run lengths as COCO's strings."""

from __future__ import annotations

from array import array

import numpy as np

from fastkd.masks import check_polygons, pack_runs

NONE, POLYGONS, RUNS = 0, 1, 2


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
