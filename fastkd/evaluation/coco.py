"""COCO box and mask metrics (AP at IoU 0.50:0.95, per size, per class) with pycocotools.

Works in one or several processes: each process adds its images, `gather` exchanges them, and then all processes have
the same results in the same order. AP and AR are percentages, or None without ground truth.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.evaluation.gather import all_gather_json, broadcast_json, is_distributed
from fastkd.evaluation.truth import load_ground_truth
from fastkd.types import Batch, Detections

if TYPE_CHECKING:  # imported at run time where it is used: training does not need it
    from pycocotools.coco import COCO

SIZES = {"s": "small", "m": "medium", "l": "large"}
_MASKS_AT_ONCE = 16


class CocoEvaluator:
    """Collects detections of a COCO-format dataset and measures them.

    Args:
        dataset: has `annotation_file` (path of the COCO JSON), `image_ids`, `class_names` and `category_ids`
            (contiguous label -> category id of the file). Only its images and categories are evaluated. With an
            `annotation_sha256` the file must still have that SHA-256 when the metrics are computed.
        max_detections: limits on the number of highest-scoring detections per image, ascending; AP uses the last, AR
            is computed for each.

    Adding an image again replaces its detections. The objects of images that were never added count as missed.
    """

    def __init__(self, dataset, *, max_detections: tuple[int, ...] = (1, 10, 100)):
        if not max_detections or list(max_detections) != sorted(set(max_detections)) or max_detections[0] < 1:
            raise ValueError(
                f"CocoEvaluator: max_detections must be ascending positive numbers, got {tuple(max_detections)}; "
                "the usual choice is (1, 10, 100)"
            )
        self.annotation_file = Path(dataset.annotation_file)
        self.image_ids = [int(i) for i in dataset.image_ids]
        self.category_ids = [int(i) for i in dataset.category_ids]
        self.class_names = _unique_names(dataset.class_names, self.category_ids)
        self.max_detections = tuple(int(n) for n in max_detections)
        self._sha256 = getattr(dataset, "annotation_sha256", None)
        self._known = set(self.image_ids)
        self._images: dict[int, list[dict]] = {}
        self._masks = False

    def add(self, batch: Batch, detections: list[Detections]) -> None:
        """Stores the detections of the images of `batch`, rescaled to the original images.

        Args:
            batch: has `image_ids`, the resized sizes (`image_sizes`) and the original sizes.
            detections: one per image of the batch, boxes and masks in pixels of the resized image.
        Raises: ValueError if counts disagree, an image is unknown, a label is out of range, or a number is not finite.
        """
        if not len(batch) == len(detections) == len(batch.image_ids):
            raise ValueError(
                f"CocoEvaluator.add: detections must have one entry per image, got {len(detections)} for "
                f"{len(batch)} images and {len(batch.image_ids)} image ids; pass detect(...) of the whole batch"
            )
        resized = batch.image_sizes.tolist()
        original = resized if batch.original_sizes is None else batch.original_sizes.tolist()
        for image_id, found, size, target in zip(batch.image_ids, detections, resized, original):
            if int(image_id) not in self._known:
                raise ValueError(
                    f"CocoEvaluator.add: image_ids must be images of {self.annotation_file}, got {image_id}; "
                    "evaluate with the dataset the loader reads"
                )
            self._images[int(image_id)] = self._to_results(int(image_id), found, size, target)
            self._masks = self._masks or found.masks is not None

    def _to_results(self, image_id: int, found: Detections, size: list[int], target: list[int]) -> list[dict]:
        boxes, scores = found.boxes.detach().float().cpu(), found.scores.detach().float().cpu()
        labels = found.labels.cpu().tolist()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(
                f"CocoEvaluator.add: boxes and scores must be finite, got NaN or infinity in image {image_id}; "
                "the weights have probably diverged"
            )
        if labels and not 0 <= min(labels) <= max(labels) < len(self.category_ids):
            raise ValueError(
                f"CocoEvaluator.add: labels must be in [0, {len(self.category_ids)}), got {min(labels)}..{max(labels)} "
                f"in image {image_id}; the detector has another number of classes than the dataset"
            )
        rows = scale_boxes(boxes, size, target).double()
        rows[:, 2:] -= rows[:, :2]  # xyxy -> xywh
        results = [
            {"image_id": image_id, "category_id": self.category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(labels, rows.tolist(), scores.double().tolist())
        ]
        if found.masks is not None:
            for result, code in zip(results, encode_masks(found.masks, target)):
                result["segmentation"] = code
        return results

    def gather(self) -> None:
        """Exchanges the detections between all processes. All ranks call it, including those without images."""
        if not is_distributed():
            return
        mine = {"masks": self._masks, "images": [[i, found] for i, found in self._images.items()]}
        for theirs in all_gather_json(mine):
            self._masks = self._masks or theirs["masks"]
            self._images.update({image_id: found for image_id, found in theirs["images"]})

    @property
    def unread(self) -> int:
        """Number of images that were never added, e.g. unreadable ones; their objects count as missed."""
        return len(self._known) - len(self._images)

    def results(self) -> list[dict]:
        """Detections in COCO's result format (image_id, category_id, bbox, score, segmentation), by image id."""
        return [result for image_id in sorted(self._images) for result in self._images[image_id]]

    def compute(self) -> dict[str, dict]:
        """Metrics of all detections that were added (and gathered).

        Returns: {"bbox": metrics} and, if the detections have masks, {"segm": metrics}. Metrics are AP, AP50, AP75,
            APs, APm, APl, AR1.. AR100, ARs, ARm, ARl, images, unread (of them), instances, and per_class:
            {name: {AP, ..., instances}}. Percentages or None; safe for JSON.
        """
        truth = load_ground_truth(
            self.annotation_file, self.image_ids, self.category_ids, masks=self._masks, sha256=self._sha256
        )
        found = self.results()
        metrics = {"bbox": self._measure(truth, found, "bbox")}
        if self._masks:
            metrics["segm"] = self._measure(truth, found, "segm")
        return metrics

    def _measure(self, truth: COCO, found: list[dict], iou_type: str) -> dict[str, Any]:
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            runner = COCOeval(truth, _as_coco(truth, found, iou_type), iou_type)
            runner.params.imgIds = self.image_ids
            runner.params.catIds = self.category_ids
            runner.params.maxDets = list(self.max_detections)
            runner.evaluate()
            runner.accumulate()
        order = np.searchsorted(runner.params.catIds, self.category_ids)  # pycocotools sorts the category ids
        precision = runner.eval["precision"][:, :, order]  # [T, R, K, A, M]
        recall = runner.eval["recall"][:, order]  # [T, K, A, M]
        metrics = _summarize(precision, recall, runner.params.iouThrs, self.max_detections)
        counts = Counter(a["category_id"] for a in truth.dataset["annotations"] if not a["iscrowd"])
        metrics["images"] = len(self._known)
        metrics["unread"] = self.unread
        metrics["instances"] = counts.total()
        metrics["per_class"] = {
            name: {
                **_summarize(
                    precision[:, :, k : k + 1], recall[:, k : k + 1], runner.params.iouThrs, self.max_detections
                ),
                "instances": counts[category],
            }
            for k, (name, category) in enumerate(zip(self.class_names, self.category_ids))
        }
        return metrics


def _unique_names(names: list[str], category_ids: list[int]) -> list[str]:
    """Unique class names: the category id is appended to names that several categories share."""
    names = [str(name) for name in names]
    return [f"{n} ({c})" if names.count(n) > 1 else n for n, c in zip(names, category_ids)]


def _summarize(precision: np.ndarray, recall: np.ndarray, thresholds: np.ndarray, max_detections) -> dict[str, Any]:
    """Means of pycocotools' tables as in its summary, as percentages; entries of -1 mean no ground truth."""

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean() * 100) if values.size else None

    at50, at75 = (int(np.argmin(np.abs(thresholds - t))) for t in (0.5, 0.75))
    metrics = {
        "AP": mean(precision[:, :, :, 0, -1]),
        "AP50": mean(precision[at50, :, :, 0, -1]),
        "AP75": mean(precision[at75, :, :, 0, -1]),
    }
    metrics |= {f"AP{letter}": mean(precision[:, :, :, 1 + a, -1]) for a, letter in enumerate(SIZES)}
    metrics |= {f"AR{limit}": mean(recall[:, :, 0, m]) for m, limit in enumerate(max_detections)}
    metrics |= {f"AR{letter}": mean(recall[:, :, 1 + a, -1]) for a, letter in enumerate(SIZES)}
    return metrics


def scale_boxes(boxes: Tensor, size: list[int], target: list[int]) -> Tensor:
    """Rescales boxes [D, 4] xyxy from an image of `size` (h, w) to `target` (h, w), and clips them to it."""
    (height, width), (target_height, target_width) = size, target
    scale = boxes.new_tensor([target_width / width, target_height / height] * 2)
    limit = boxes.new_tensor([target_width, target_height] * 2)
    return (boxes * scale).clamp(min=0).minimum(limit)


def resize_masks(masks: Tensor, target: list[int]) -> Tensor:
    """Resizes masks [D, h, w] bool to `target` (h, w): bilinear, thresholded at 0.5."""
    if list(masks.shape[-2:]) == list(target):
        return masks
    if not len(masks):
        return masks.new_zeros(0, *target)
    soft = F.interpolate(masks[:, None].float(), size=tuple(target), mode="bilinear", align_corners=False)
    return soft[:, 0] >= 0.5


def encode_masks(masks: Tensor, target: list[int]) -> list[dict]:
    """COCO run-length codes of masks [D, h, w] bool resized to `target` (h, w)."""
    from pycocotools import mask as mask_codec

    codes = []
    for chunk in masks.split(_MASKS_AT_ONCE) if len(masks) else ():
        chunk = resize_masks(chunk, target)
        planes = np.asfortranarray(chunk.cpu().numpy().transpose(1, 2, 0), dtype=np.uint8)  # [h, w, D]
        codes += [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in mask_codec.encode(planes)]
    return codes


def _as_coco(truth: COCO, found: list[dict], iou_type: str) -> COCO:
    """Detections as a COCO object. Does not use COCO.loadRes, which fails without detections."""
    from pycocotools import mask as mask_codec
    from pycocotools.coco import COCO

    annotations = []
    for number, result in enumerate(found, start=1):
        area = result["bbox"][2] * result["bbox"][3]
        if iou_type == "segm":
            area = float(mask_codec.area(result["segmentation"]))
        annotations.append({**result, "id": number, "iscrowd": 0, "area": area})
    coco = COCO()
    coco.dataset = {**truth.dataset, "annotations": annotations}
    coco.createIndex()
    return coco


def evaluate(
    detector,
    loader,
    evaluator: CocoEvaluator,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """Evaluates a detector on the batches of a loader; all ranks call it and all get the metrics.

    Args:
        detector: has `features(images)` and `detect(pyramid, batch)`; evaluated in eval mode, its modes are restored.
        loader: yields Batch; all its images are added to the evaluator.
        evaluator: an empty CocoEvaluator; afterwards it has the detections of all processes.
        device: the detector's device.
        dtype: autocast to this type (torch.bfloat16), or None for the precision of the weights.
        progress: show a bar with rate and time left (on rank 0).
    Returns: `CocoEvaluator.compute()` of all ranks' images.
    """
    device = torch.device(device)
    first = not is_distributed() or torch.distributed.get_rank() == 0
    training = detector.training
    detector.eval()
    try:
        with torch.inference_mode(), _progress(loader, progress and first) as batches:
            for batch in batches:
                batch = batch.to(device)
                with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    detections = detector.detect(detector.features(batch.images), batch)
                evaluator.add(batch, detections)
    finally:
        detector.train(training)
    evaluator.gather()
    return broadcast_json(evaluator.compute() if first else None)


@contextlib.contextmanager
def _progress(loader, shown: bool):
    """The loader's batches, with a progress bar if `shown`."""
    if not shown:
        yield loader
        return
    from fastkd.evaluation.tables import progress_bar

    with progress_bar(unit="batches") as bar:
        task = bar.add_task("evaluate", total=len(loader) if hasattr(loader, "__len__") else None)

        def batches():
            for batch in loader:
                yield batch
                bar.advance(task)

        yield batches()
