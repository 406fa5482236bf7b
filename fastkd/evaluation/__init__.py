"""COCO and CrowdHuman metrics, in one process or several, and tables of them."""

from fastkd.evaluation.coco import CocoEvaluator, evaluate
from fastkd.evaluation.crowdhuman import CrowdHumanEvaluator
from fastkd.evaluation.tables import class_table, crowd_table, print_metrics, size_table, summary_table

__all__ = [
    "CocoEvaluator",
    "CrowdHumanEvaluator",
    "class_table",
    "crowd_table",
    "evaluate",
    "evaluator_of",
    "print_metrics",
    "size_table",
    "summary_table",
]


def evaluator_of(dataset, max_detections: int | None = None) -> CocoEvaluator:
    """The evaluator of a data set's format.

    Args:
        dataset: has `format`, "coco" or "crowdhuman", and the attributes that the evaluator of that format needs.
        max_detections: number of highest-scoring detections per image to evaluate; None for the format's usual 100 or
            500.
    """
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"evaluator_of: max_detections must be at least 1, got {max_detections}")
    if dataset.format == "crowdhuman":
        return CrowdHumanEvaluator(dataset, **({} if max_detections is None else {"max_detections": max_detections}))
    most = 100 if max_detections is None else max_detections
    return CocoEvaluator(dataset, max_detections=tuple(sorted({min(1, most), min(10, most), most})))
