"""CrowdHuman's three metrics from matched detections (methods.md 5): MR^-2, AP and JI.

Boxes are xyxy in pixels of the image file. A region to ignore matches any number of detections, which then count
neither as right nor as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from fastkd.boxes import box_area, box_intersection, box_iou

OVERLAP = 0.5  # a match needs a larger IoU or IoA
EPS = 1e-6
FALSE_POSITIVES_PER_IMAGE = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)
SMALLEST_MISS_RATE = 1e-10  # lower limit, since the mean is over logarithms
SCORES = tuple(i / 10 for i in range(10))


def clip_to_image(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes [n, 4] with x1 in [0, width - 1], x2 in [0, width], y likewise."""
    limits = np.array([width - 1, height - 1, width, height], np.float64)
    return np.clip(boxes, 0.0, limits)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and IoA = intersection / area of the first, of boxes [n, 4] with others [m, 4]: two [n, m]."""
    first, second = torch.tensor(boxes)[:, None], torch.tensor(others)
    covered = box_intersection(first, second) / (box_area(first) + EPS)
    return box_iou(first, second, EPS).numpy(), covered.numpy()


@dataclass(frozen=True)
class ImageMatch:
    """The matching of one image's detections, by descending score.

    Args:
        scores: [D].
        right: [D] int8: 1 matched a box, 0 wrong, -1 in a region to ignore.
        objects: number of boxes without regions to ignore.
        matched: [10] matches k of JI at each score threshold.
        union: [10] m + n - k at each score threshold.
    """

    scores: np.ndarray
    right: np.ndarray
    objects: int
    matched: np.ndarray
    union: np.ndarray


def match_image(
    found: np.ndarray, scores: np.ndarray, truth: np.ndarray, ignored: np.ndarray, size: tuple[int, int]
) -> ImageMatch:
    """Matches the detections of one image with its boxes.

    Args:
        found: [D, 4] detections.
        scores: [D].
        truth: [K, 4] boxes as annotated.
        ignored: [K] bool, regions to ignore among them.
        size: (width, height) of the image.
    """
    order = np.argsort(-scores, kind="stable")
    found, scores = clip_to_image(found[order], *size), scores[order]
    truth = clip_to_image(truth, *size)
    boxes, regions = truth[~ignored], truth[ignored]
    iou = overlaps(found, boxes)[0]
    covered, hidden = (np.any(overlaps(one, regions)[1] > OVERLAP, axis=1) for one in (found, boxes))
    matched, union = _jaccard(iou, scores, covered, hidden)
    return ImageMatch(scores, _greedy(iou, covered), len(boxes), matched, union)


def _greedy(iou: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """[D] int8: each detection in turn matches the free box of highest IoU, else a region to ignore, else is wrong.

    The loop covers only detections with enough overlap with some box.
    """
    right = np.where(covered, -1, 0).astype(np.int8)
    free = iou.copy()
    for row in np.flatnonzero((iou > OVERLAP).any(1)) if iou.shape[1] else ():
        best = int(free[row].argmax())
        if free[row, best] > OVERLAP:
            right[row] = 1
            free[:, best] = -1.0
    return right


def _jaccard(
    iou: np.ndarray, scores: np.ndarray, covered: np.ndarray, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Number of matches and size of the union at each score threshold.

    The matching has the maximum number of pairs and, among such matchings, the highest sum of IoU, which makes it
    unique. Unmatched detections and boxes in regions to ignore do not count.
    """
    matched, union = np.zeros(len(SCORES), np.int64), np.zeros(len(SCORES), np.int64)
    counts = [int((scores >= threshold).sum()) for threshold in SCORES]
    known: dict[int, tuple[int, int]] = {}
    for place, count in enumerate(counts):
        if count not in known:
            rows, columns = _maximum_matching(iou[:count])
            k = len(rows)
            n = count - int(covered[:count].sum()) + int(covered[rows].sum())
            m = len(hidden) - int(hidden.sum()) + int(hidden[columns].sum())
            known[count] = k, m + n - k
        matched[place], union[place] = known[count]
    return matched, union


def _maximum_matching(iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the maximum bipartite matching over IoU > OVERLAP with the highest total IoU."""
    allowed = iou > OVERLAP
    rows, columns = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
    if not len(rows):
        return rows, columns
    part = np.ix_(rows, columns)
    most = min(len(rows), len(columns))
    gain = np.where(allowed[part], most + 1 + iou[part], 0.0)  # an additional pair outweighs any sum of IoU
    chosen_rows, chosen_columns = linear_sum_assignment(gain, maximize=True)
    real = allowed[part][chosen_rows, chosen_columns]
    return rows[chosen_rows[real]], columns[chosen_columns[real]]


def summarise(images: list[ImageMatch]) -> dict[str, float | int | None]:
    """MR (MR^-2), AP, JI and recall as percentages; JI_score, the best JI's threshold; counts. None without objects."""
    objects = sum(image.objects for image in images)
    result: dict[str, float | int | None] = {"instances": objects, "images": len(images)}
    if not objects:
        return {"AP": None, "MR": None, "JI": None, "recall": None, "JI_score": None, **result}
    scores = np.concatenate([image.scores for image in images])
    right = np.concatenate([image.right for image in images])
    order = np.argsort(-scores, kind="stable")
    right = right[order]
    right = right[right >= 0]
    hits, misses = np.cumsum(right), np.cumsum(1 - right)
    recall = hits / objects
    matched = np.stack([image.matched for image in images])
    union = np.stack([image.union for image in images])
    ratios = np.divide(matched, union, out=np.zeros(matched.shape), where=union > 0)
    jaccard = ratios.sum(0) / np.maximum((union > 0).sum(0), 1)
    best = int(jaccard.argmax())
    return {
        "AP": 100.0 * average_precision(recall, hits / np.maximum(hits + misses, 1)),
        "MR": 100.0 * log_average_miss_rate(misses / len(images), 1.0 - recall),
        "JI": 100.0 * float(jaccard[best]),
        "recall": 100.0 * float(recall[-1]) if len(recall) else 0.0,
        "JI_score": SCORES[best],
        **result,
    }


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the unsmoothed curve by the trapezoidal rule, from its first point."""
    return float(((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum())


def log_average_miss_rate(false_positives: np.ndarray, miss_rate: np.ndarray) -> float:
    """Geometric mean of the miss rates at nine values of false positives per image.

    Args:
        false_positives: [n] per image, non-decreasing.
        miss_rate: [n]; read at the first point that reaches each value, or at the last point.
    """
    if not len(miss_rate):
        return 1.0
    places = np.searchsorted(false_positives, FALSE_POSITIVES_PER_IMAGE, side="left")
    taken = miss_rate[np.minimum(places, len(miss_rate) - 1)]
    return float(np.exp(np.log(np.maximum(taken, SMALLEST_MISS_RATE)).mean()))
