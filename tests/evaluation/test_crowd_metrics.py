"""MR^-2, AP and JI: hand-computed cases, and a slow transcription of the definition."""

import itertools
import math

import numpy as np
import pytest

from fastkd.evaluation.crowd_matching import (
    FALSE_POSITIVES_PER_IMAGE,
    average_precision,
    clip_to_image,
    log_average_miss_rate,
    match_image,
    overlaps,
    summarise,
)

SIZE = (200, 100)


def image(found, scores, boxes, regions=(), size=SIZE):
    truth = np.array([*boxes, *regions], np.float64).reshape(-1, 4)
    ignored = np.arange(len(truth)) >= len(boxes)
    return match_image(np.array(found, np.float64).reshape(-1, 4), np.array(scores, np.float64), truth, ignored, size)


A, B, C = [0, 0, 20, 40], [50, 0, 70, 40], [100, 0, 120, 40]
ON_A, ON_B = [0, 0, 20, 38], [51, 0, 71, 40]
NOWHERE, REGION, IN_REGION = [150, 60, 160, 80], [140, 0, 190, 50], [150, 10, 170, 40]


def test_boxes_are_clipped_as_defined():
    boxes = np.array([[-5.0, -5, 300, 300], [250, 150, 260, 160], [-9, -9, -2, -2]])
    assert clip_to_image(boxes, *SIZE).tolist() == [[0, 0, 200, 100], [199, 99, 200, 100], [0, 0, 0, 0]]


def test_overlaps():
    iou, ioa = overlaps(np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10], [0, 0, 10, 40], [50, 50, 60, 60]]))
    np.testing.assert_allclose(iou, [[1 / 3, 0.25, 0]], rtol=1e-6)
    np.testing.assert_allclose(ioa, [[0.5, 1, 0]], rtol=1e-6)


def test_perfect_detections():
    result = summarise([image([A, B], [0.9, 0.8], [A, B]), image([C], [0.7], [C])])
    assert result["AP"] == pytest.approx(100 * (1 - 1 / 3))  # trapezoids start at the first point, recall 1/3
    assert result["MR"] == pytest.approx(100 * 1e-10) and result["recall"] == 100 and result["JI"] == pytest.approx(100)
    assert result["instances"] == 3 and result["images"] == 2 and result["JI_score"] == 0.0


def test_metrics_computed_by_hand():
    """Two images, three boxes; detections right, wrong, right, and one in an ignore region, which counts as nothing."""
    one = image([ON_A, NOWHERE, IN_REGION], [0.9, 0.8, 0.85], [A, B], [REGION])
    two = image([C], [0.35], [C])
    assert one.right.tolist() == [1, -1, 0] and one.objects == 2
    result = summarise([one, two])
    # recall 1/3, 1/3, 2/3 with precision 1, 1/2, 2/3
    assert result["AP"] == pytest.approx(100 * (1 / 3) * (1 / 2 + 2 / 3) / 2)
    # miss rates 2/3, 2/3, 1/3 at 0, 0.5, 0.5 false positives an image. 0.01 .. 0.3162: the first point at or past them
    # is the second; above 0.5 no point is left, so the last one, 1/3, is taken for 0.5623 and 1.0
    assert result["MR"] == pytest.approx(100 * ((2 / 3) ** 7 * (1 / 3) ** 2) ** (1 / 9))
    # from 0.4 to 0.8 the first image has k = 1, n = 2 without the one in the region, m = 2; the second is empty of
    # detections: k = 0, n = 0, m = 1. Up to 0.3: 1 / 3 and 1. At 0.9: 1 / 2 and 0.
    assert one.matched.tolist() == [1] * 10 and one.union.tolist() == [3] * 9 + [2]
    assert result["JI"] == pytest.approx(100 * (1 / 3 + 1) / 2) and result["JI_score"] == 0.0


def test_best_free_box_is_taken_and_only_once():
    between = [0, 0, 20, 40]
    found = image([between, between], [0.9, 0.8], [[0, 0, 20, 36], [0, 0, 20, 40], [0, 0, 20, 30]])
    assert found.right.tolist() == [1, 1]  # the box of IoU 1 first, then the unmatched box of IoU 0.9
    three = image([between] * 4, [0.9, 0.8, 0.7, 0.6], [[0, 0, 20, 36], [0, 0, 20, 40], [0, 0, 20, 30]])
    assert three.right.tolist() == [1, 1, 1, 0]


def test_a_box_comes_before_a_region_and_regions_are_reusable():
    region = [0, 0, 60, 60]
    found = image([A, A, [1, 0, 21, 40], [30, 0, 90, 40]], [0.9, 0.8, 0.7, 0.6], [A], [region])
    assert found.right.tolist() == [1, -1, -1, 0]  # the last lies exactly half inside, IoA must exceed 0.5


def test_iou_of_one_half_does_not_match():
    assert image([[0, 0, 20, 20]], [0.9], [[0, 0, 20, 40]]).right.tolist() == [0]
    assert image([[0, 0, 20, 20.1]], [0.9], [[0, 0, 20, 40]]).right.tolist() == [1]


def test_matching_is_maximum_where_greedy_is_not():
    """The first detection matches both boxes; the second matches only the box that the first matches best."""
    left, right = [0, 0, 20, 40], [6, 0, 26, 40]
    found = image([[2, 0, 22, 40], [-4, 0, 14, 40]], [0.9, 0.8], [left, right])
    assert found.right.tolist() == [1, 0] and found.matched[0] == 2 and found.union[0] == 2


def test_boxes_in_regions_count_only_when_matched():
    inside = [150, 10, 160, 30]
    assert image([], [], [inside], [REGION]).union.tolist() == [0] * 10
    assert image([inside], [0.95], [inside], [REGION]).union.tolist() == [1] * 10
    empty = summarise([image([], [], [inside], [REGION]), image([A], [0.95], [A])])
    assert empty["JI"] == pytest.approx(100)  # an image without boxes and detections is left out of the mean


def test_nothing_found_and_nothing_there():
    assert summarise([image([], [], [A])]) == {
        "AP": 0.0, "MR": 100.0, "JI": 0.0, "recall": 0.0, "JI_score": 0.0, "instances": 1, "images": 1
    }  # fmt: skip
    nothing = summarise([image([A], [0.5], [], [REGION])])
    assert nothing["AP"] is nothing["MR"] is nothing["JI"] is None and nothing["instances"] == 0


def test_false_positives_are_per_image():
    rates = np.array([0.0, 0.005, 0.05, 2.0])
    misses = np.array([0.8, 0.6, 0.4, 0.2])
    taken = [next((m for r, m in zip(rates, misses) if r >= at), misses[-1]) for at in FALSE_POSITIVES_PER_IMAGE]
    assert log_average_miss_rate(rates, misses) == pytest.approx(math.exp(np.log(taken).mean()))
    assert average_precision(np.array([0.1, 0.5]), np.array([1.0, 0.5])) == pytest.approx(0.3)


# the definition, transcribed box by box


def slow_iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(area) - width * height + 1e-6), width * height / (area[0] + 1e-6)


def slow_clip(box, width, height):
    return [min(max(box[0], 0), width - 1), min(max(box[1], 0), height - 1), min(max(box[2], 0), width),
            min(max(box[3], 0), height)]  # fmt: skip


def slow_greedy(found, truth, ignored):
    taken, marks = set(), []
    for box in found:
        best, place = 0.5, None
        for j, other in enumerate(truth):
            if not ignored[j] and j not in taken and slow_iou(box, other)[0] > best:
                best, place = slow_iou(box, other)[0], j
        if place is not None:
            taken.add(place)
            marks.append(1)
        else:
            marks.append(-1 if any(ignored[j] and slow_iou(box, truth[j])[1] > 0.5 for j in range(len(truth))) else 0)
    return marks


def slow_matching(found, boxes):
    """The best of all matchings: most pairs, then the highest sum of IoU."""
    best = (0, 0.0, ())

    def extend(row, pairs, total):
        nonlocal best
        if (len(pairs), total) > best[:2]:
            best = (len(pairs), total, tuple(pairs))
        if row < len(found):
            extend(row + 1, pairs, total)
            for j, box in enumerate(boxes):
                iou = slow_iou(found[row], box)[0]
                if iou > 0.5 and all(j != used for _, used in pairs):
                    extend(row + 1, [*pairs, (row, j)], total + iou)

    extend(0, [], 0.0)
    return best[2]


def slow_metrics(images):
    entries, objects, ratios = [], 0, [[] for _ in range(10)]
    for found, scores, truth, ignored, size in images:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        found, scores = [slow_clip(found[i], *size) for i in order], [scores[i] for i in order]
        truth = [slow_clip(box, *size) for box in truth]
        objects += sum(not flag for flag in ignored)
        entries += [(s, m) for s, m in zip(scores, slow_greedy(found, truth, ignored)) if m >= 0]
        boxes = [box for box, flag in zip(truth, ignored) if not flag]
        regions = [box for box, flag in zip(truth, ignored) if flag]
        for step in range(10):
            kept = [box for box, s in zip(found, scores) if s >= step / 10]
            pairs = slow_matching(kept, boxes)
            free = [b for i, b in enumerate(kept) if all(i != r for r, _ in pairs)]
            free_boxes = [b for j, b in enumerate(boxes) if all(j != c for _, c in pairs)]
            n = len(kept) - sum(any(slow_iou(b, r)[1] > 0.5 for r in regions) for b in free)
            m = len(boxes) - sum(any(slow_iou(b, r)[1] > 0.5 for r in regions) for b in free_boxes)
            if m + n - len(pairs) > 0:
                ratios[step].append(len(pairs) / (m + n - len(pairs)))
    entries.sort(key=lambda entry: -entry[0])
    points, tp, fp = [], 0, 0
    for _, mark in entries:
        tp, fp = tp + mark, fp + 1 - mark
        points.append((tp / objects, tp / (tp + fp), fp / len(images)))
    area = sum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in itertools.pairwise(points))
    rates = [next((1 - p[0] for p in points if p[2] >= at), 1 - points[-1][0]) for at in FALSE_POSITIVES_PER_IMAGE]
    miss = math.exp(sum(math.log(max(rate, 1e-10)) for rate in rates) / len(rates))
    return {"AP": 100 * area, "MR": 100 * miss, "JI": 100 * max(sum(r) / max(len(r), 1) for r in ratios)}


def random_image(rng):
    count = int(rng.integers(0, 6))
    corner = rng.uniform(-15, 90, (count, 2))
    truth = np.concatenate([corner, corner + rng.uniform(10, 40, (count, 2))], 1)
    near = truth[rng.integers(0, count, 6)] + rng.normal(0, 4, (6, 4)) if count else np.zeros((0, 4))
    wild = rng.uniform(0, 60, (3, 2))
    found = np.concatenate([near, np.concatenate([wild, wild + rng.uniform(5, 30, (3, 2))], 1)])
    return found, rng.random(len(found)).round(2), truth, rng.random(count) < 0.3, (100, 80)


@pytest.mark.parametrize("seed", range(6))
def test_against_the_slow_transcription(seed):
    rng = np.random.default_rng(seed)
    images = [random_image(rng) for _ in range(8)]
    result = summarise([match_image(*item) for item in images])
    for name, expected in slow_metrics(images).items():
        assert result[name] == pytest.approx(expected, rel=1e-9), name


def test_five_hundred_detections_an_image():
    """As many detections as a CrowdHuman submission may have; equal to the loop over all of them."""
    rng = np.random.default_rng(9)
    truth = np.concatenate([corner := rng.uniform(0, 900, (60, 2)), corner + rng.uniform(20, 80, (60, 2))], 1)
    found = truth[rng.integers(0, 60, 500)] + rng.normal(0, 6, (500, 4))
    scores, ignored = rng.random(500), rng.random(60) < 0.2
    got = match_image(found, scores, truth, ignored, (1000, 1000))
    order = np.argsort(-scores, kind="stable")
    clipped = [[slow_clip(box, 1000, 1000) for box in boxes.tolist()] for boxes in (found[order], truth)]
    assert got.right.tolist() == slow_greedy(*clipped, ignored.tolist())
