"""MR^-2, AP and JI of detections on a CrowdHuman data set, in one process or several."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastkd.evaluation.coco import CocoEvaluator, Found
from fastkd.evaluation.crowd_matching import match_image, summarise
from fastkd.progress import track

MAX_DETECTIONS = 500


class CrowdHumanEvaluator(CocoEvaluator):
    """Collects detections of a CrowdHuman data set and measures them.

    Args:
        dataset: a CrowdHumanDataset (has `truth`, `sizes` and the attributes that CocoEvaluator needs).
        max_detections: number of highest-scoring detections per image to evaluate.

    Source: CrowdHuman (Shao et al., 2018); methods.md 5.
    """

    def __init__(self, dataset, *, max_detections: int = MAX_DETECTIONS):
        super().__init__(dataset, max_detections=(max_detections,))
        self.dataset = dataset

    def compute(self) -> dict[str, dict]:
        """Metrics of all detections that were added (and gathered).

        Returns: {"bbox": {AP, MR, JI, recall, JI_score, images, unread (of them), instances, ignored, per_class}}. MR
            is MR^-2, lower is better. Percentages, or None without objects; per_class repeats them for the only
            class. Safe for JSON.
        """
        limit, images, ignored = self.max_detections[-1], [], 0
        for index, image_id in enumerate(track(self.image_ids, "measure", "images")):
            truth, regions = self.dataset.truth(index)
            found = self._images.get(image_id, Found(np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0)))
            boxes = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)  # xyxy
            best = np.argsort(-found.scores, kind="stable")[:limit]
            width, height = (int(side) for side in self.dataset.sizes[index])
            images.append(match_image(boxes[best], found.scores[best], truth, regions, (width, height)))
            ignored += int(regions.sum())
        metrics: dict[str, Any] = summarise(images)
        own = {name: metrics[name] for name in ("AP", "MR", "JI", "recall", "instances")}
        return {"bbox": {**metrics, "unread": self.unread, "ignored": ignored, "per_class": {self.class_names[0]: own}}}
