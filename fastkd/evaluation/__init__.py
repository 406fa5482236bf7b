"""COCO metrics of boxes and masks, in one process or several, and the tables that show them."""

from fastkd.evaluation.coco import CocoEvaluator, evaluate
from fastkd.evaluation.tables import class_table, print_metrics, size_table, summary_table

__all__ = ["CocoEvaluator", "class_table", "evaluate", "print_metrics", "size_table", "summary_table"]
