"""The doctor's check of the teacher: its AP on a few batches, and the classes of its well-placed boxes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from fastkd.boxes import box_iou
from fastkd.data import build_eval_loader
from fastkd.detectors import Detector
from fastkd.evaluation import evaluator_of
from fastkd.progress import track
from fastkd.training.build import Built
from fastkd.training.doctor.finding import Finding
from fastkd.types import Batch, Detections

LEAST_AP = 5.0
LEAST_NAMED = 0.5
ENOUGH_LOCATED = 5


class _Subset:
    """A subset of a data set's images, for an evaluator."""

    def __init__(self, dataset, rows: list[int]):
        self.format, self.annotation_file = dataset.format, dataset.annotation_file
        self.class_names, self.category_ids = dataset.class_names, dataset.category_ids
        self.image_ids, self.sizes = dataset.image_ids[rows], dataset.sizes[rows]
        self._dataset, self._rows = dataset, rows

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See CrowdHumanDataset.truth."""
        return self._dataset.truth(self._rows[index])


def check_quality(teacher: Detector, built: Built, batches: int, device: torch.device) -> Iterator[Finding]:
    """Measures the teacher's AP on some validation batches; reports a wrong class map or an untrained teacher.

    Args:
        teacher: the teacher, on `device`.
        built: data and recipe of the run.
        batches: number of batches.
        device: device of the teacher.
    """
    data, val_set = built.recipe.data, built.val_set
    loader = build_eval_loader(
        val_set,
        batch_size=data.val_batch_size,
        short_side=data.val_short_side,
        max_side=data.max_side,
        divisor=data.divisor,
    )
    seen: list[tuple[Batch, list[Detections]]] = []
    for batch in track(itertools.islice(loader, batches), "evaluate the teacher", "batches", min(batches, len(loader))):
        batch = batch.to(device)
        with torch.inference_mode():
            seen.append((batch, teacher.detect(teacher.features(batch.images), batch)))
    rows = {int(image_id): row for row, image_id in enumerate(val_set.image_ids)}
    part = _Subset(val_set, [rows[image_id] for batch, _ in seen for image_id in batch.image_ids])
    evaluator = evaluator_of(part)
    for batch, found in seen:
        evaluator.add(batch, [Detections(one.boxes, one.scores, one.labels) for one in found])
    score = evaluator.compute()["bbox"]["AP"]
    if score is None:
        yield Finding("warning", "teacher", f"the first {len(part.image_ids)} validation images hold no object")
        return
    located, named = _located(seen)
    text = f"AP {score:.1f} on {len(part.image_ids)} validation images"
    if teacher.num_classes > 1 and located >= ENOUGH_LOCATED and named < LEAST_NAMED * located:
        yield Finding(
            "problem",
            "teacher",
            f"{text}: its class map is wrong, only {named} of {located} objects that it finds get their own class; "
            "its labels are not the data's although the names are",
        )
    elif score < LEAST_AP:
        yield Finding(
            "problem",
            "teacher",
            f"{text}: it looks untrained, or trained on other images or sizes; measure it with `fastkd evaluate`",
        )
    else:
        yield Finding("ok", "teacher", text)


def _located(seen: list[tuple[Batch, list[Detections]]]) -> tuple[int, int]:
    """Numbers of objects with a detection of IoU > 0.5, and of those whose best such detection has the right class."""
    located = named = 0
    for batch, detections in seen:
        for row, found in enumerate(detections):
            own = batch.image_index == row
            overlap = box_iou(batch.boxes[own][:, None], found.boxes) > 0.5  # [k, D], D by falling score
            hit = overlap.any(1)
            if not hit.any():
                continue
            best = overlap[hit].float().argmax(1)  # the first is the most certain
            located += int(hit.sum())
            named += int((found.labels[best] == batch.labels[own][hit]).sum())
    return located, named
