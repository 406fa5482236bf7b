"""COCO box and mask metrics (AP at IoU 0.50:0.95, per size, per class) with pycocotools.

Works in one or several processes: each process adds its images, `gather` exchanges them, and then all processes have
the same results in the same order. AP and AR are percentages, or None without ground truth.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.evaluation.gather import all_gather_json, broadcast_json
from fastkd.evaluation.truth import load_ground_truth
from fastkd.ops._support.normalizer import is_distributed
from fastkd.progress import track
from fastkd.types import Batch, Detections

if TYPE_CHECKING:  # imported at run time where it is used: training does not need it
    from pycocotools.cocoeval import Params


class Found(NamedTuple):
    """The D detections of an image: a tenth of the memory of D entries in COCO's result format.

    labels [D] int; boxes [D, 4] float64 xywh, pixels of the image file; scores [D] float64; codes: run-length codes of
    the masks, or None without masks.
    """

    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    codes: list[dict] | None = None


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
        self._images: dict[int, Found] = {}
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
            self._images[int(image_id)] = self._check(int(image_id), found, size, target)
            self._masks = self._masks or found.masks is not None

    def _check(self, image_id: int, found: Detections, size: list[int], target: list[int]) -> Found:
        boxes, scores = found.boxes.detach().float().cpu(), found.scores.detach().float().cpu()
        labels = found.labels.cpu().numpy()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(
                f"CocoEvaluator.add: boxes and scores must be finite, got NaN or infinity in image {image_id}; "
                "the weights have probably diverged"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.category_ids):
            raise ValueError(
                f"CocoEvaluator.add: labels must be in [0, {len(self.category_ids)}), got "
                f"{labels.min()}..{labels.max()} in image {image_id}; the detector has another number of classes than "
                "the dataset"
            )
        rows = scale_boxes(boxes, size, target).double()
        rows[:, 2:] -= rows[:, :2]  # xyxy -> xywh
        codes = None if found.masks is None else encode_masks(found.masks, target)
        return Found(labels.astype(np.int32), rows.numpy(), scores.double().numpy(), codes)

    def gather(self) -> None:
        """Exchanges the detections between all processes. All ranks call it, including those without images."""
        if not is_distributed():
            return
        images = [
            [image_id, found.labels.tolist(), found.boxes.tolist(), found.scores.tolist(), found.codes]
            for image_id, found in self._images.items()
        ]
        for theirs in all_gather_json({"masks": self._masks, "images": images}):
            self._masks = self._masks or theirs["masks"]
            for image_id, labels, boxes, scores, codes in theirs["images"]:
                box_array = np.array(boxes, np.float64).reshape(-1, 4)
                self._images[image_id] = Found(np.array(labels, np.int32), box_array, np.array(scores), codes)

    @property
    def unread(self) -> int:
        """Number of images that were never added, e.g. unreadable ones; their objects count as missed."""
        return len(self._known) - len(self._images)

    def iterate_results(self) -> Iterator[dict]:
        """Detections in COCO's result format (image_id, category_id, bbox, score, segmentation), by image id."""
        for image_id, found in sorted(self._images.items()):
            columns = found.labels.tolist(), found.boxes.tolist(), found.scores.tolist()
            for row, (label, box, score) in enumerate(zip(*columns)):
                result = {"image_id": image_id, "category_id": self.category_ids[label], "bbox": box, "score": score}
                yield result if found.codes is None else {**result, "segmentation": found.codes[row]}

    def results(self) -> list[dict]:
        """`iterate_results` as a list."""
        return list(self.iterate_results())

    def compute(self) -> dict[str, dict]:
        """Metrics of all detections that were added (and gathered).

        Returns: {"bbox": metrics} and, if the detections have masks, {"segm": metrics}. Metrics are AP, AP50, AP75,
            APs, APm, APl, AR1.. AR100, ARs, ARm, ARl, images, unread (of them), instances, and per_class:
            {name: {AP, ..., instances}}. Percentages or None; safe for JSON.
        """
        truth = load_ground_truth(
            self.annotation_file, self.image_ids, self.category_ids, masks=self._masks, sha256=self._sha256
        )
        metrics = {"bbox": self._measure(truth, "bbox")}
        if self._masks:
            metrics["segm"] = self._measure(truth, "segm")
        return metrics

    def _measure(self, truth: dict[int, list[dict]], iou_type: str) -> dict[str, Any]:
        """The metrics of boxes or masks, class by class: exact, as no statistic of pycocotools mixes classes.

        pycocotools takes all classes at once, and visits every image for every class. Here a class visits the images
        that hold its objects or detections, and the memory is that of the largest class.
        """
        from pycocotools.cocoeval import Params

        params = Params(iou_type)
        params.maxDets = list(self.max_detections)
        shape = (len(self.category_ids), len(params.areaRng), len(params.maxDets))  # K, A, M
        precision = np.full((len(params.iouThrs), len(params.recThrs), *shape), -1.0)  # [T, R, K, A, M]
        recall = np.full((len(params.iouThrs), *shape), -1.0)  # [T, K, A, M]
        labels = track(range(len(self.category_ids)), f"measure {iou_type}", "classes")
        for label, found in zip(labels, self._by_class()):
            objects = truth[self.category_ids[label]]
            if objects or found:
                precision[:, :, label], recall[:, label] = _accumulate(objects, found, params)
        metrics = _summarize(precision, recall, params.iouThrs, self.max_detections)
        counts = [sum(not a["iscrowd"] for a in truth[category]) for category in self.category_ids]
        metrics["images"] = len(self._known)
        metrics["unread"] = self.unread
        metrics["instances"] = sum(counts)
        metrics["per_class"] = {
            name: {
                **_summarize(precision[:, :, k : k + 1], recall[:, k : k + 1], params.iouThrs, self.max_detections),
                "instances": counts[k],
            }
            for k, name in enumerate(self.class_names)
        }
        return metrics

    def _by_class(self) -> Iterator[list[dict]]:
        """The detections of each label in turn, in COCO's result format and in the order of `results`."""
        images = sorted(self._images.items())
        labels = np.concatenate([np.zeros(0, np.int32), *(found.labels for _, found in images)])
        counts = np.array([len(found.labels) for _, found in images], np.int64)
        owner = np.repeat(np.arange(len(images)), counts)
        place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # row within the image
        ends = np.cumsum(np.bincount(labels, minlength=len(self.category_ids)))
        for label, rows in enumerate(np.split(np.argsort(labels, kind="stable"), ends[:-1])):
            results = []
            for image, row in zip(owner[rows].tolist(), place[rows].tolist()):
                image_id, found = images[image]
                entry = {"image_id": image_id, "category_id": self.category_ids[label]}
                entry |= {"bbox": found.boxes[row].tolist(), "score": float(found.scores[row])}
                results.append(entry if found.codes is None else {**entry, "segmentation": found.codes[row]})
            yield results


def _accumulate(objects: list[dict], found: list[dict], params: Params) -> tuple[np.ndarray, np.ndarray]:
    """pycocotools' tables of precision [T, R, A, M] and recall [T, A, M] of one class.

    Args:
        objects: its annotations.
        found: its detections.
        params: thresholds and limits.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides = []
    for entries in (objects, _as_annotations(found, params.iouType)):
        side = COCO()
        side.dataset = {"annotations": entries, "categories": []}
        side.anns = {entry["id"]: entry for entry in entries}
        for entry in entries:
            side.imgToAnns[entry["image_id"]].append(entry)
            if params.iouType == "segm":
                side.imgs[entry["image_id"]] = dict(zip(("height", "width"), entry["segmentation"]["size"]))
        sides.append(side)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = COCOeval(*sides, params.iouType)
        runner.params.imgIds = sorted({*sides[0].imgToAnns, *sides[1].imgToAnns})
        runner.params.catIds = [(objects or found)[0]["category_id"]]
        runner.params.maxDets = params.maxDets
        runner.evaluate()
        runner.accumulate()
    return runner.eval["precision"][:, :, 0], runner.eval["recall"][:, 0]


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


def _as_annotations(found: list[dict], iou_type: str) -> list[dict]:
    """Detections as annotations, with ids from 1 and areas; COCO.loadRes fails without detections."""
    from pycocotools import mask as mask_codec

    annotations = []
    for number, result in enumerate(found, start=1):
        area = result["bbox"][2] * result["bbox"][3]
        if iou_type == "segm":
            area = float(mask_codec.area(result["segmentation"]))
        annotations.append({**result, "id": number, "iscrowd": 0, "area": area})
    return annotations


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
        progress: show rate and time left on a terminal (on rank 0).
    Returns: `CocoEvaluator.compute()` of all ranks' images.
    """
    device = torch.device(device)
    first = not is_distributed() or torch.distributed.get_rank() == 0
    training = detector.training
    detector.eval()
    try:
        with torch.inference_mode():
            for batch in track(loader, "evaluate", "batches") if progress and first else loader:
                batch = batch.to(device)
                with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    detections = detector.detect(detector.features(batch.images), batch)
                evaluator.add(batch, detections)
    finally:
        detector.train(training)
    evaluator.gather()
    return broadcast_json(evaluator.compute() if first else None)
