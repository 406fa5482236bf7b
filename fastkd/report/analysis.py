"""Error analysis of detections: right, wrong class, poorly placed, duplicate or background.

Plain numpy on one image at a time; boxes are xyxy in pixels of the image file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fastkd.boxes import box_area, box_intersection, box_iou

RIGHT, WRONG_CLASS, POOR_LOCALISATION, DUPLICATE, BACKGROUND, IGNORED = range(6)
KINDS = ("right", "wrong class", "poor localisation", "duplicate", "background", "ignored")
ERROR_KINDS = (WRONG_CLASS, POOR_LOCALISATION, DUPLICATE, BACKGROUND)
KIND_MEANING = {
    WRONG_CLASS: "overlaps an object well (IoU of at least 0.5) but names another class",
    POOR_LOCALISATION: "names the class of an object it overlaps only partly (IoU between 0.1 and 0.5)",
    DUPLICATE: "a second detection of an object that a higher-scoring one has already found",
    BACKGROUND: "overlaps no object of its class, and none of another class well",
}
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (32.0**2, 96.0**2)  # COCO's area limits, in square pixels of the image file


@dataclass
class Truth:
    """The ground truth of one image: boxes [K, 4], labels [K], and crowd regions [I, 4]."""

    boxes: np.ndarray
    labels: np.ndarray
    ignore_boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


@dataclass
class ImageDetections:
    """The detections of one image in order of descending score: boxes [D, 4], scores [D], labels [D]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass
class Verdict:
    """The result of `judge` for one image.

    kinds [D]: kind of each detection, RIGHT ... IGNORED. partner [D]: index of the box it is judged against, -1 for
    none. found_score [K]: score of the detection that matched each box, -1 for a box without a match.
    """

    kinds: np.ndarray
    partner: np.ndarray
    found_score: np.ndarray


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: [N, 4] and [M, 4] xyxy -> [N, M]; 0 for boxes without area."""
    return box_iou(torch.tensor(first)[:, None], torch.tensor(second)).numpy()


def judge(truth: Truth, found: ImageDetections) -> Verdict:
    """Classifies every detection of an image, matching in order of descending score as COCO does at IoU 0.5.

    A detection is right if it matches the free box of its class with the highest IoU >= 0.5. Otherwise it is a
    duplicate (such a box exists but is matched already), ignored (more than half of it lies in a crowd region), of the
    wrong class (IoU >= 0.5 with a box of another class), poorly placed (IoU >= 0.1 with a box of its class), or
    background.
    """
    iou = pairwise_iou(found.boxes, truth.boxes)  # [D, K]
    same = found.labels[:, None] == truth.labels[None]
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    covered = _covered_share(found.boxes, truth.ignore_boxes)  # [D, regions]
    kinds = np.full(len(found.scores), BACKGROUND)
    partner = np.full(len(found.scores), -1)
    if len(truth.labels):
        poor, wrong = own.max(axis=1) >= 0.1, other.max(axis=1) >= 0.5
        kinds[poor], partner[poor] = POOR_LOCALISATION, own.argmax(axis=1)[poor]
        kinds[wrong], partner[wrong] = WRONG_CLASS, other.argmax(axis=1)[wrong]
    ignored = covered.max(axis=1, initial=0.0) > 0.5
    kinds[ignored], partner[ignored] = IGNORED, -1
    found_score = np.full(len(truth.labels), -1.0)
    for d in np.flatnonzero(own.max(axis=1, initial=0.0) >= 0.5):
        free = np.where(found_score < 0, own[d], 0.0)
        if free.max() >= 0.5:
            kinds[d], partner[d] = RIGHT, free.argmax()
            found_score[partner[d]] = found.scores[d]
        else:
            kinds[d], partner[d] = DUPLICATE, own[d].argmax()
    return Verdict(kinds, partner, found_score)


def best_threshold(verdicts: list[Verdict], founds: list[ImageDetections], boxes: int) -> float:
    """The score threshold with the best F1 = 2 right / (detections + boxes) over all images; 0.5 if none is right.

    Scores of different detectors are not comparable, so each detector is shown at its best threshold.
    """
    scores = np.concatenate([found.scores for found in founds]) if founds else np.zeros(0)
    kinds = np.concatenate([verdict.kinds for verdict in verdicts]) if verdicts else np.zeros(0, dtype=int)
    scores, kinds = scores[kinds != IGNORED], kinds[kinds != IGNORED]
    if not (kinds == RIGHT).any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(kinds[order] == RIGHT)
    f1 = 2 * right / (np.arange(1, len(order) + 1) + boxes)
    last_of_its_score = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][np.where(last_of_its_score, f1, -1.0).argmax()])


def size_index(boxes: np.ndarray) -> np.ndarray:
    """COCO's size class of each box, 0 small, 1 medium, 2 large, by its area in the image file: [K, 4] -> [K]."""
    return np.searchsorted(SIZE_LIMITS, box_area(torch.tensor(boxes)).numpy(), side="right")


def miss_reason(box: int, truth: Truth, found: ImageDetections, verdict: Verdict, threshold: float) -> str:
    """Why the box with index `box` counts as missed at `threshold`."""
    if verdict.found_score[box] >= 0:
        return f"found, but only with score {verdict.found_score[box]:.2f}"
    iou = pairwise_iou(found.boxes, truth.boxes[box : box + 1])[:, 0]
    above = found.scores >= threshold
    same = found.labels == truth.labels[box]
    if (above & ~same & (iou >= 0.5)).any():
        return "taken for another class"
    if (above & same & (iou >= 0.1)).any():
        return "box poorly placed"
    if (above & (iou >= 0.1)).any():
        return "only an overlapping detection of another class"
    return "nothing there"


def error_counts(verdicts: list[Verdict], founds: list[ImageDetections], threshold: float) -> dict[int, int]:
    """{kind: number of detections with score >= threshold}, including right and ignored ones."""
    counts = {kind: 0 for kind in range(len(KINDS))}
    for verdict, found in zip(verdicts, founds):
        for kind in verdict.kinds[found.scores >= threshold]:
            counts[int(kind)] += 1
    return counts


def miss_counts(verdicts: list[Verdict], truths: list[Truth], threshold: float) -> dict[str, tuple[int, int]]:
    """{size class: (missed boxes, boxes)} at a score threshold."""
    missed, total = np.zeros(3, dtype=int), np.zeros(3, dtype=int)
    for verdict, truth in zip(verdicts, truths):
        sizes = size_index(truth.boxes)
        total += np.bincount(sizes, minlength=3)
        missed += np.bincount(sizes[verdict.found_score < threshold], minlength=3)
    return {size: (int(missed[i]), int(total[i])) for i, size in enumerate(SIZES)}


def _covered_share(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of each box's area that lies in each region: [N, 4], [M, 4] -> [N, M]."""
    box = torch.tensor(boxes)[:, None]
    return (box_intersection(box, torch.tensor(regions)) / box_area(box).clamp_(min=1e-9)).numpy()
