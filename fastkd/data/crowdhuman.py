"""CrowdHuman's annotation format (odgt): one JSON object per line, with full, visible and head box of each person.

    {"ID": "273275,1a9b000", "gtboxes": [{"tag": "person", "fbox": [x, y, w, h], "vbox": [...], "hbox": [...],
                                          "extra": {"ignore": 0, "box_id": 0}, "head_attr": {"ignore": 0}}, ...]}

The image of a line is ID.jpg. A box whose tag is not "person" or whose extra.ignore is 1 is a region to ignore.
"""

from __future__ import annotations

import json
import os
from array import array
from typing import Any

import numpy as np

from fastkd.data.annotations import OUTSIDE, AnnotationArrays, BadEntry, Problems, check_box
from fastkd.data.coco import DetectionDataset
from fastkd.data.images import MAX_PIXELS, BadImageError, ImageFolder, read_size

BOXES = {"full": "fbox", "visible": "vbox", "head": "hbox"}
MAX_LINE = 1 << 26  # characters; the longest line of CrowdHuman has 10^5
_CALLER = "CrowdHumanDataset"


class CrowdHumanDataset(DetectionDataset):
    """People of a CrowdHuman annotation file: one class, "person", and regions to ignore.

    The file does not contain image sizes, so the headers of all images are read on opening. Bad lines, images and boxes
    are skipped and counted in `skipped`, or raise with strict. Boxes of partly visible people extend beyond the image:
    they are clipped for training and kept whole for the metrics (`truth`).

    Args:
        annotation_file: odgt file.
        image_dir: folder of the images ID.jpg; no ID may lead out of it.
        boxes: the boxes used as objects: "full", "visible" or "head".
        strict: raise ValueError with file and line at the first bad line, image or box; also makes the loaders raise
            on an image that cannot be decoded.
        max_pixels: a larger image is bad.
    Raises: FileNotFoundError if file or folder is missing; ValueError if no line is usable.

    Attributes: those of DetectionDataset; image_ids are line numbers, from 1.
    """

    format = "crowdhuman"
    with_masks = False

    def __init__(
        self,
        annotation_file: str | os.PathLike,
        image_dir: str | os.PathLike,
        *,
        boxes: str = "full",
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        if boxes not in BOXES:
            raise ValueError(f"{_CALLER}: boxes must be one of {', '.join(BOXES)}, got {boxes!r}")
        self.annotation_file, self.image_dir = os.fspath(annotation_file), os.fspath(image_dir)
        self.strict, self.max_pixels, self.boxes = strict, max_pixels, boxes
        if not os.path.isfile(self.annotation_file):
            raise FileNotFoundError(
                f"{_CALLER}: annotation_file must be an existing file, got {self.annotation_file!r}; "
                "`fastkd data crowd` writes a generated data set in this format"
            )
        problems = Problems(self.annotation_file, strict, _CALLER)
        reader = _Reader(ImageFolder(image_dir, _CALLER), self.image_dir, BOXES[boxes], max_pixels, problems)
        reader.read(self.annotation_file)
        self._arrays = reader.arrays()
        self._whole = np.array(reader.whole, np.float64).reshape(-1, 4)
        self._ignored = np.array(reader.ignored, bool)
        self._whole_starts = np.array(reader.whole_starts, np.int64)
        self._note(problems)

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """All boxes of an image for the metrics: [n, 4] float64 xyxy as annotated, and [n] bool, regions to ignore."""
        span = slice(self._whole_starts[index], self._whole_starts[index + 1])
        return self._whole[span], self._ignored[span]


class _Reader:
    """Checks lines one by one and collects them as flat arrays."""

    def __init__(self, folder: ImageFolder, image_dir: str, box: str, max_pixels: int, problems: Problems):
        self.folder, self.image_dir, self.box = folder, image_dir, box
        self.max_pixels, self.problems = max_pixels, problems
        self.seen: set[str] = set()
        self.ids, self.sizes = array("q"), array("i")
        self.name_bytes, self.name_ends = bytearray(), array("q", [0])
        self.boxes, self.crowd, self.starts = array("f"), array("b"), array("q", [0])
        self.whole, self.ignored, self.whole_starts = array("d"), array("b"), array("q", [0])
        self.clipped = 0

    def read(self, path: str) -> None:
        """All lines of a file. Raises: ValueError if none is usable."""
        lines = 0
        with open(path, "rb") as file:
            for number in range(1, 2**31):
                line = file.readline(MAX_LINE)
                if not line:
                    break
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    raise ValueError(
                        f"{_CALLER}: {path}: line {number} must be shorter than {MAX_LINE} bytes; is it odgt?"
                    )
                if line.strip():
                    lines += 1
                    self.add_line(number, line)
        if not self.ids:
            found = f"{lines} lines, left out: {self.problems.summary()}" if lines else "an empty file"
            raise ValueError(
                f"{_CALLER}: {path}: the file must hold at least one usable line of CrowdHuman's odgt format, "
                f"got {found}"
            )

    def add_line(self, number: int, line: bytes) -> None:
        """Adds one image with its boxes, or reports a problem with the line number."""
        try:
            name, size, boxes = self.check_line(line)
        except BadEntry as bad:
            self.problems.report(bad.reason, f"line {number}: {bad}")
            return
        self.ids.append(number)
        self.sizes.extend(size)
        self.name_bytes += name.encode("utf-8", "surrogatepass")
        self.name_ends.append(len(self.name_bytes))
        for place, item in enumerate(boxes):
            try:
                self.add_box(item, *size)
            except BadEntry as bad:
                self.problems.report(bad.reason, f"line {number}: box {place}: {bad}")
        self.starts.append(len(self.crowd))
        self.whole_starts.append(len(self.ignored))

    def check_line(self, line: bytes) -> tuple[str, tuple[int, int], list]:
        """File name, size and boxes of a line. Raises: BadEntry."""
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadEntry("line not JSON", f"it must be a JSON object ({type(error).__name__}: {error})") from None
        identity = item.get("ID") if isinstance(item, dict) else None
        if not isinstance(identity, str):
            hint = "; a COCO file goes with format coco" if isinstance(item, dict) and "images" in item else ""
            raise BadEntry("malformed line", f"it must be an object with a text 'ID', got {item!r:.80}{hint}")
        if identity in self.seen:
            raise BadEntry("duplicate ID", f"its ID must be unique, got {identity!r:.80} twice")
        if not isinstance(item.get("gtboxes"), list):
            raise BadEntry("malformed line", f"gtboxes must be a list, got {item.get('gtboxes')!r:.80}")
        name = f"{identity}.jpg"
        problem = self.folder.problem(name)
        if problem:
            raise BadEntry(problem[0], f"ID {identity!r:.200}: {problem[1]}")
        try:
            size = read_size(os.path.join(self.image_dir, name), self.max_pixels)
        except BadImageError as error:
            raise BadEntry("unreadable image", str(error)) from None
        self.seen.add(identity)
        return name, size, item["gtboxes"]

    def add_box(self, item: Any, width: int, height: int) -> None:
        """Appends one box. Raises: BadEntry; a box outside the image is kept for the metrics."""
        if not isinstance(item, dict) or not isinstance(item.get("tag"), str):
            raise BadEntry("malformed box", f"it must be an object with a text 'tag', got {item!r:.80}")
        ignored = item["tag"] != "person" or _flag(item, "extra")
        if self.box == "hbox":
            ignored = ignored or _flag(item, "head_attr")
        try:
            whole, clipped, moved = check_box(item.get(self.box), width, height, self.box)
        except BadEntry as bad:
            if bad.reason == OUTSIDE:  # counts in the metrics, but cannot be trained on
                x, y, w, h = (float(value) for value in item[self.box])
                self._add_whole((x, y, x + w, y + h), ignored)
            raise
        self._add_whole(whole, ignored)
        self.boxes.extend(clipped)
        self.crowd.append(ignored)
        self.clipped += moved

    def _add_whole(self, box: tuple[float, float, float, float], ignored: bool) -> None:
        self.whole.extend(box)
        self.ignored.append(ignored)

    def arrays(self) -> AnnotationArrays:
        """The checked annotations for the loaders."""
        count = len(self.crowd)
        return AnnotationArrays(
            category_ids=[1],
            class_names=["person"],
            image_ids=np.array(self.ids, np.int64),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            name_bytes=np.frombuffer(bytes(self.name_bytes), np.uint8),
            name_ends=np.array(self.name_ends, np.int64),
            starts=np.array(self.starts, np.int64),
            boxes=np.array(self.boxes, np.float32).reshape(-1, 4),
            labels=np.zeros(count, np.int32),
            crowd=np.array(self.crowd, bool),
            annotation_ids=np.arange(1, count + 1),
            segmentations=None,
            clipped=self.clipped,
        )


def _flag(item: dict, group: str) -> bool:
    """Whether item[group].ignore is 1; a missing group or flag means 0. Raises: BadEntry."""
    values = item.get(group, {})
    value = values.get("ignore", 0) if isinstance(values, dict) else None
    if type(value) not in (int, bool) or value not in (0, 1):
        raise BadEntry(
            "malformed box", f"{group} must be an object whose ignore is 0 or 1, got {item.get(group)!r:.80}"
        )
    return bool(value)
