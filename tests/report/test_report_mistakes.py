"""The report's judgements: each kind of mistake, right detections as pycocotools matches them, the best threshold."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastkd.report import analysis
from fastkd.report.analysis import (
    BACKGROUND,
    DUPLICATE,
    IGNORED,
    POOR_LOCALISATION,
    RIGHT,
    WRONG_CLASS,
    ImageDetections,
    Truth,
)


def test_each_kind_of_mistake():
    truth = Truth(
        np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], float),
        np.array([0, 1, 0]),
        np.array([[60.0, 0, 90, 30]]),
    )
    boxes = [[0, 0, 10, 9], [0, 0, 10, 8], [20, 0, 30, 11], [43, 0, 53, 10], [46, 0, 56, 10], [70, 5, 80, 15]]
    boxes += [[200, 200, 210, 210], [5, 5, 5, 5]]
    found = ImageDetections(np.array(boxes, float), np.linspace(0.9, 0.2, 8), np.array([0, 0, 0, 0, 0, 3, 0, 0]))
    verdict = analysis.judge(truth, found)
    expected = [RIGHT, DUPLICATE, WRONG_CLASS, RIGHT, POOR_LOCALISATION, IGNORED, BACKGROUND, BACKGROUND]
    assert verdict.kinds.tolist() == expected
    assert verdict.partner.tolist() == [0, 0, 1, 2, 2, -1, -1, -1]
    assert verdict.found_score.tolist() == pytest.approx([0.9, -1.0, 0.6])
    counts = analysis.error_counts([verdict], [found], 0.55)
    assert [counts[kind] for kind in (RIGHT, WRONG_CLASS, DUPLICATE, POOR_LOCALISATION)] == [2, 1, 1, 0]
    assert analysis.miss_counts([verdict], [truth], 0.7) == {"small": (2, 3), "medium": (0, 0), "large": (0, 0)}
    reasons = [analysis.miss_reason(k, truth, found, verdict, 0.65) for k in (1, 2)]
    assert reasons == ["taken for another class", "found, but only with score 0.60"]


def test_without_boxes_or_detections():
    nothing = ImageDetections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    empty = Truth(np.zeros((0, 4)), np.zeros(0, int))
    one = ImageDetections(np.array([[0.0, 0, 5, 5]]), np.array([0.5]), np.array([0]))
    assert analysis.judge(empty, one).kinds.tolist() == [BACKGROUND]
    verdict = analysis.judge(Truth(one.boxes, one.labels), nothing)
    assert verdict.kinds.tolist() == [] and verdict.found_score.tolist() == [-1.0]
    assert analysis.miss_reason(0, Truth(one.boxes, one.labels), nothing, verdict, 0.5) == "nothing there"
    assert analysis.best_threshold([verdict], [nothing], 1) == 0.5
    assert analysis.best_threshold([], [], 0) == 0.5


def random_images(rng, images=30, classes=3):
    truths, founds = [], []
    for _ in range(images):
        k, d = rng.integers(0, 8), rng.integers(0, 25)
        boxes = np.concatenate([low := rng.uniform(0, 60, (k, 2)), low + rng.uniform(5, 40, (k, 2))], axis=1)
        guesses = np.concatenate([low := rng.uniform(0, 60, (d, 2)), low + rng.uniform(5, 40, (d, 2))], axis=1)
        labels, guessed = rng.integers(0, classes, k), rng.integers(0, classes, d)
        near = rng.random(d) < 0.6
        if k:
            partner = rng.integers(0, k, near.sum())
            guesses[near] = boxes[partner] + rng.normal(0, 2.5, (near.sum(), 4))
            guessed[near] = np.where(rng.random(near.sum()) < 0.7, labels[partner], guessed[near])
        truths.append(Truth(boxes, labels))
        founds.append(ImageDetections(guesses, np.sort(rng.random(d))[::-1], guessed))
    return truths, founds


def test_right_detections_are_those_pycocotools_matches():
    truths, founds = random_images(np.random.default_rng(3))
    xywh = lambda box: [float(v) for v in (*box[:2], *(box[2:] - box[:2]))]  # noqa: E731
    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": xywh(box), "area": 1.0, "iscrowd": 0}
        for i, truth in enumerate(truths)
        for box, label in zip(truth.boxes, truth.labels)
    ]
    results = [
        {"image_id": i, "category_id": int(label), "bbox": xywh(box), "area": 1.0, "score": float(score), "iscrowd": 0}
        for i, found in enumerate(founds)
        for box, label, score in zip(found.boxes, found.labels, found.scores)
    ]
    content = {"images": [{"id": i} for i in range(len(truths))], "categories": [{"id": c} for c in range(3)]}
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (annotations, results):
            coco = COCO()
            coco.dataset = content | {"annotations": [row | {"id": n} for n, row in enumerate(rows, 1)]}
            coco.createIndex()
            sets.append(coco)
        runner = COCOeval(*sets, "bbox")
        runner.params.iouThrs, runner.params.areaRng = np.array([0.5]), [[0, 1e10]]
        runner.params.areaRngLbl = ["all"]
        runner.evaluate()
    matched = {
        detection
        for item in runner.evalImgs
        if item is not None
        for detection, match in zip(item["dtIds"], item["dtMatches"][0])
        if match
    }
    ours, number = set(), 0
    for truth, found in zip(truths, founds):
        for kind in analysis.judge(truth, found).kinds:
            number += 1
            if kind == RIGHT:
                ours.add(number)
    assert ours == matched and len(ours) > 40


def test_best_threshold_by_trying_all():
    truths, founds = random_images(np.random.default_rng(4))
    verdicts = [analysis.judge(truth, found) for truth, found in zip(truths, founds)]
    boxes = sum(len(truth.labels) for truth in truths)

    def f1(threshold):
        counts = analysis.error_counts(verdicts, founds, threshold)
        return 2 * counts[RIGHT] / (sum(counts.values()) + boxes)

    best = max((f1(score), score) for found in founds for score in found.scores)
    assert analysis.best_threshold(verdicts, founds, boxes) == best[1]
