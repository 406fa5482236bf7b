"""A COCO-format data set in flat arrays, which loader workers share instead of copying."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from dataclasses import dataclass

import numpy as np

from fastkd.data.annotations import AnnotationArrays, Problems, log, read_annotations
from fastkd.data.images import MAX_PIXELS, ImageFolder, read_image


@dataclass
class Sample:
    """One image and its ground truth, before resizing.

    Args:
        image: [H, W, 3] uint8 RGB.
        boxes: [k, 4] float32 xyxy of the objects.
        labels: [k] int64.
        ignore_boxes: [i, 4] float32 xyxy of the crowd regions.
        masks: [k, H, W] bool, or None without masks.
        image_id: id in the annotation file.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore_boxes: np.ndarray
    masks: np.ndarray | None
    image_id: int


class DetectionDataset:
    """Images with labelled boxes and regions to ignore, stored in checked flat arrays; one subclass per file format.

    Attributes: num_classes, class_names, category_ids (by label), image_ids [n], sizes [n, 2] (width, height),
        skipped {reason: count}, clipped (number of boxes that were clipped by more than a pixel), format.
    """

    format = ""  # file format: "coco" or "crowdhuman"
    annotation_file: str
    image_dir: str
    strict: bool
    with_masks: bool
    max_pixels: int
    skipped: dict[str, int]
    clipped: int
    _arrays: AnnotationArrays
    _opened = float("inf")  # time of opening; infinity never warns
    _changed: set[int]

    @property
    def has_objects(self) -> bool:
        """Whether any image has an object that is not a crowd region."""
        return not bool(self._arrays.crowd.all())

    @functools.cached_property  # needed for every checkpoint
    def fingerprint(self) -> str:
        """SHA-256 of the annotations used in training, without masks: images, names, sizes, boxes, classes."""
        arrays, digest = self._arrays, hashlib.sha256()
        digest.update(repr((arrays.category_ids, arrays.class_names)).encode())
        for values in (
            arrays.image_ids,
            arrays.sizes,
            arrays.name_bytes,
            arrays.name_ends,
            arrays.starts,
            arrays.boxes,
            arrays.labels,
            arrays.crowd,
        ):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @property
    def annotation_sha256(self) -> str | None:
        """SHA-256 of the annotation file as it was read; None for formats whose evaluation does not read it again."""
        return self._arrays.sha256

    def _note(self, problems: Problems) -> None:
        """Stores and logs the counts of skipped and clipped entries."""
        self._opened, self._changed = time.time(), set()
        self.skipped, self.clipped = dict(problems.counts), self._arrays.clipped
        kind = type(self).__name__
        if self.skipped:
            log.warning("%s: %s: left out %s", kind, self.annotation_file, problems.summary())
        if self.clipped:
            log.info("%s: %s: clipped %d boxes to their images", kind, self.annotation_file, self.clipped)

    def __len__(self) -> int:
        return len(self._arrays.image_ids)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.annotation_file}: {len(self)} images, {len(self._arrays.labels)} boxes, "
            f"{self.num_classes} classes)"
        )

    @property
    def num_classes(self) -> int:
        return len(self._arrays.category_ids)

    @property
    def class_names(self) -> list[str]:
        """Class names by label."""
        return list(self._arrays.class_names)

    @property
    def category_ids(self) -> list[int]:
        """Category ids of the annotation file, by label."""
        return list(self._arrays.category_ids)

    @property
    def image_ids(self) -> np.ndarray:
        """[n] int64, in the order of the file."""
        return self._arrays.image_ids

    @property
    def sizes(self) -> np.ndarray:
        """[n, 2] int32 (width, height) of the image files."""
        return self._arrays.sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        a = self._arrays
        held = [a.image_ids, a.sizes, a.name_bytes, a.name_ends, a.starts, a.boxes, a.labels, a.crowd, a.annotation_ids]
        if a.segmentations is not None:
            held += list(vars(a.segmentations).values())
        return sum(item.nbytes for item in held)

    def file_name(self, index: int) -> str:
        """Name of an image file, relative to image_dir."""
        start, end = self._arrays.name_ends[index : index + 2]
        return self._arrays.name_bytes[start:end].tobytes().decode("utf-8", "surrogatepass")

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All objects without crowd regions: boxes [K, 4] xyxy, labels [K], image index [K]."""
        rows = ~self._arrays.crowd
        owner = np.repeat(np.arange(len(self)), np.diff(self._arrays.starts))
        return self._arrays.boxes[rows], self._arrays.labels[rows], owner[rows]

    def annotated(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All annotations of an image: boxes [k, 4] xyxy in pixels of the file, labels [k], crowd [k] bool."""
        span = slice(self._arrays.starts[index], self._arrays.starts[index + 1])
        return self._arrays.boxes[span], self._arrays.labels[span], self._arrays.crowd[span]

    def targets(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ground truth of an image: boxes [k, 4] xyxy, labels [k] int64, ignore boxes [i, 4], pixels of the file."""
        boxes, labels, crowd = self.annotated(index)
        return boxes[~crowd], labels[~crowd].astype(np.int64), boxes[crowd]

    def masks(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Masks of the objects of an image, in the order of `targets`, at `size` (height, width); None: original size.

        Returns: [k, height, width] bool.
        Raises: ValueError if the data set was opened without masks.
        """
        store = self._arrays.segmentations
        if store is None:
            raise ValueError("CocoDataset.masks: with_masks must be True, got False; open the data set with_masks=True")
        width, height = (int(v) for v in self._arrays.sizes[index])
        rows_out, columns_out = size or (height, width)
        start, end = self._arrays.starts[index], self._arrays.starts[index + 1]
        rows = start + np.flatnonzero(~self._arrays.crowd[start:end])
        masks = [store.decode(row, height, width, (rows_out, columns_out)) for row in rows]
        return np.stack(masks) if masks else np.zeros((0, rows_out, columns_out), bool)

    def read_image(self, index: int) -> np.ndarray:
        """Pixels of an image: [H, W, 3] uint8 RGB. Raises: BadImageError naming the file."""
        width, height = (int(v) for v in self._arrays.sizes[index])
        path = os.path.join(self.image_dir, self.file_name(index))
        self._warn_if_changed(index, path)
        return read_image(path, (width, height), self.max_pixels)

    def _warn_if_changed(self, index: int, path: str) -> None:
        """Logs once, in each process, that an image file changed after the data set was opened."""
        try:
            changed = os.stat(path).st_ctime > self._opened and index not in self._changed
        except (OSError, ValueError):
            return  # read_image says why
        if changed:
            self._changed.add(index)
            log.warning("image %s: changed after the data set was opened; its new content is used", path)

    def load(self, index: int) -> Sample:
        """Image and ground truth before resizing. Raises: BadImageError naming the file."""
        boxes, labels, ignore = self.targets(index)
        masks = self.masks(index) if self.with_masks else None
        return Sample(self.read_image(index), boxes, labels, ignore, masks, int(self._arrays.image_ids[index]))


class CocoDataset(DetectionDataset):
    """Images, boxes and masks of a COCO annotation file.

    Category ids may be sparse; label c is the c-th smallest id. Crowd annotations are regions to ignore, not objects.
    Bad images and boxes (see fastkd.data.annotations) are skipped and counted in `skipped`, or raise with strict.

    Args:
        annotation_file: COCO JSON.
        image_dir: folder of the images; no file name may lead out of it.
        strict: raise ValueError with file and id at the first bad image or box; also makes the loaders raise on an
            image that cannot be decoded instead of counting and replacing it.
        with_masks: read the segmentations; an object without a valid one is then bad.
        keep_empty: keep images without objects (background samples).
        max_pixels: a larger image is bad.
    Raises: FileNotFoundError if file or folder is missing; ValueError if the file is malformed or nothing is usable.

    Attributes: num_classes, class_names, category_ids (by label), image_ids [n], sizes [n, 2] (width, height),
        skipped {reason: count}, clipped (number of boxes that were clipped by more than a pixel).
    """

    format = "coco"

    def __init__(
        self,
        annotation_file: str | os.PathLike,
        image_dir: str | os.PathLike,
        *,
        strict: bool = False,
        with_masks: bool = False,
        keep_empty: bool = True,
        max_pixels: int = MAX_PIXELS,
    ):
        self.annotation_file = os.fspath(annotation_file)
        self.image_dir = os.fspath(image_dir)
        self.strict = strict
        self.with_masks = with_masks
        self.max_pixels = max_pixels
        arrays, problems = read_annotations(
            self.annotation_file, ImageFolder(image_dir), strict=strict, with_masks=with_masks, max_pixels=max_pixels
        )
        if not keep_empty:
            objects = np.concatenate([[0], np.cumsum(~arrays.crowd)])[arrays.starts]
            rows = np.flatnonzero(np.diff(objects) > 0)
            if not rows.size:
                raise ValueError(
                    f"CocoDataset: {self.annotation_file}: at least one image must have an object, got none; "
                    "pass keep_empty=True to use images without"
                )
            arrays = arrays.keep_images(rows)
        self._arrays = arrays
        self._note(problems)
