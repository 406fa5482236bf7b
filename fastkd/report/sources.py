"""Inputs of the pictures besides the run directories: validation images with boxes, and detections on them.

Only this file and networks.py of the report import data sets, detectors and training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastkd.data.formats import open_dataset
from fastkd.data.images import BadImageError
from fastkd.report.analysis import ImageDetections, Truth
from fastkd.report.html import clean
from fastkd.report.results import to_results
from fastkd.report.runs import Run


class ValidationSet:
    """The validation images of a run: pictures and ground truth in pixels of the image files, by COCO image id.

    Args:
        annotation_file, image_dir: as in the run's recipe.
        with_masks: also read instance masks.
        format, crowd_boxes: as in the run's recipe.
    Raises: FileNotFoundError or ValueError if the files are missing or malformed.
    """

    def __init__(
        self,
        annotation_file: Path,
        image_dir: Path,
        with_masks: bool = False,
        format: str = "coco",
        crowd_boxes: str = "full",
    ):
        self.dataset = open_dataset(format, annotation_file, image_dir, with_masks=with_masks, crowd_boxes=crowd_boxes)
        self.class_names = [str(name) for name in self.dataset.class_names]
        self.image_ids = [int(image_id) for image_id in self.dataset.image_ids]
        self.unreadable: list[str] = []
        self._position = {image_id: position for position, image_id in enumerate(self.image_ids)}
        self._label = {int(category): label for label, category in enumerate(self.dataset.category_ids)}

    def image(self, image_id: int) -> np.ndarray:
        """The picture, uint8 [H, W, 3]; plain grey if the file cannot be read (listed in `unreadable`)."""
        position = self._position[image_id]
        try:
            return self.dataset.read_image(position)
        except BadImageError as error:
            if str(error) not in self.unreadable:
                self.unreadable.append(str(error))
            width, height = self.dataset.sizes[position]
            return np.full((int(height), int(width), 3), 128, dtype=np.uint8)

    def position(self, image_id: int) -> int:
        """Index of an image in the data set."""
        return self._position[image_id]

    def file_name(self, image_id: int) -> str:
        """Name of the image file, relative to its folder."""
        return self.dataset.file_name(self._position[image_id])

    def truth(self, image_id: int) -> Truth:
        """Boxes, labels and crowd regions of one image."""
        return Truth(*self.dataset.targets(self._position[image_id]))

    def found(self, run: Run) -> dict[int, ImageDetections]:
        """The run's detections by image id, for every image; detections of unknown images or classes are dropped."""
        results = to_results([])[0] if run.detections is None else run.detections
        sizes = self.dataset.sizes
        return {
            image_id: results.of_image(image_id, self._label, sizes[position])
            for image_id, position in self._position.items()
        }


def validation_set(runs: list[Run]) -> tuple[ValidationSet | None, str]:
    """The validation set of the first run with readable files, or None and why not. Runs on other data get a note."""
    problems: list[str] = []
    source: ValidationSet | None = None
    used: tuple[Path, ...] = ()
    masks = any((run.recipe.get("method") or {}).get("use_masks") for run in runs if run.method)
    for run in runs:
        data = run.recipe.get("data")
        if not isinstance(data, dict):
            problems.append(f"{run.name}: recipe.json names no data.")
            continue
        root = Path(str(data.get("root", "")))
        files = (root / str(data.get("val_annotations", "")), root / str(data.get("val_images", "")))
        if source is None:
            try:
                form, crowd = str(data.get("format", "coco")), str(data.get("crowd_boxes", "full"))
                source, used = ValidationSet(*files, with_masks=bool(masks), format=form, crowd_boxes=crowd), files
            except (OSError, ValueError) as error:
                problems.append(f"{run.name}: {clean(error, 300)}")
        elif [file.resolve() for file in files] != [file.resolve() for file in used]:
            run.notes.append(f"it was measured on {files[0]}, the pictures are of {used[0]}: it is left out of them.")
            run.detections = None
    return source, " ".join(dict.fromkeys(problems))
