"""ATSS and POTO against slow transcriptions that go location by location and box by box."""

import math

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from detector_cases import rectangles, small_config
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from fastkd.detectors import build_detector
from fastkd.detectors.common.locations import candidate_cells
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes
from fastkd.detectors.poto import match_one_to_one

COUNTS = [4, 0, 1, 6]


def setting(kind, size=(96, 64), **changes):
    """A detector with large predictions, boxes with centres off cell corners, and a random pyramid."""
    torch.manual_seed(3)
    detector = build_detector(small_config(kind, head_convs=1, **changes))
    with torch.no_grad():
        for parameter in detector.head.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape))
        detector.head.regression_head.bbox_reg.bias.fill_(1.0)
        detector.head.regression_head.scales.copy_(torch.tensor([1.0, 0.8, 0.9, 1.2, 1.1]))
    batch = rectangles(COUNTS, size=size)
    batch.boxes = batch.boxes + 3 * torch.rand(batch.boxes.shape)
    pyramid = [torch.randn(4, 32, -(-size[0] // s), -(-size[1] // s), requires_grad=True) for s in detector.strides]
    return detector, batch, pyramid


def locations(pyramid, strides):
    """(level, stride, x, y) of every location, in the order of the head's outputs."""
    return [
        (level, stride, stride // 2 + column * stride, stride // 2 + row * stride)
        for level, (maps, stride) in enumerate(zip(pyramid, strides))
        for row in range(maps.shape[-2])
        for column in range(maps.shape[-1])
    ]


def boxes_from(sides, places):
    """The box each location predicts."""
    rows = []
    for (left, top, right, bottom), (_, stride, x, y) in zip(sides.unbind(), places):
        rows.append(torch.stack([x - left * stride, y - top * stride, x + right * stride, y + bottom * stride]))
    return torch.stack(rows)


def atss_assignment(boxes, places, half=4.0):
    """The box of each location or -1, by the paper's text."""
    squares = torch.tensor([[x - half * s, y - half * s, x + half * s, y + half * s] for _, s, x, y in places])
    taken = {}
    for number, box in enumerate(boxes.tolist()):
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates = []
        for level in range(5):
            own = [i for i, place in enumerate(places) if place[0] == level]
            own.sort(key=lambda i: math.dist(center, places[i][2:]))
            candidates += own[:9]
        iou = box_iou(torch.tensor([box]), squares[candidates])[0]
        threshold = iou.mean() + iou.std()
        for index, value in zip(candidates, iou.tolist()):
            x, y = places[index][2:]
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if inside and value >= threshold and value > taken.get(index, (0.0, None))[0]:
                taken[index] = (value, number)
    return [taken.get(index, (0, BACKGROUND))[1] for index in range(len(places))]


def poto_assignment(boxes, labels, logits, predicted, places, alpha=0.8):
    """One location for every box with candidates, from the full table of boxes and locations."""
    iou = box_iou(boxes, predicted)
    table = torch.full(iou.shape, -1.0)
    for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist())):
        for index, (_, stride, x, y) in enumerate(places):
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            near = abs(x - middle[0]) < 1.5 * stride and abs(y - middle[1]) < 1.5 * stride
            if inside and near:
                probability = torch.sigmoid(logits[index, label])
                table[number, index] = probability ** (1 - alpha) * iou[number, index] ** alpha
    rows, columns = scipy.optimize.linear_sum_assignment(table.detach().numpy(), maximize=True)
    matched = [BACKGROUND] * len(places)
    for row, column in zip(rows, columns):
        if table[row, column] >= 0:
            matched[column] = int(row)
    return matched


def centerness(box, x, y):
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    return ((min(left, right) / max(left, right)) * (min(top, bottom) / max(top, bottom))) ** 0.5


def transcription(kind, detector, batch, pyramid):
    """The losses by name, image by image."""
    outputs, places = detector.head(pyramid), locations(pyramid, detector.strides)
    focal, giou, center, weights, positives = 0.0, 0.0, 0.0, 0.0, 0
    parts = zip(batch.boxes.split(batch.counts), batch.labels.split(batch.counts))
    for image, (boxes, labels) in enumerate(parts):
        logits, sides = outputs["cls_logits"][image], outputs["bbox_regression"][image]
        predicted = boxes_from(sides, places)
        if kind == "atss":
            matched = atss_assignment(boxes, places)
        else:
            matched = poto_assignment(boxes, labels, logits, predicted, places)
        target = torch.zeros_like(logits)
        for index, row in enumerate(matched):
            if row == BACKGROUND:
                continue
            positives += 1
            target[index, labels[row]] = 1.0
            error = generalized_box_iou_loss(predicted[index], boxes[row])
            weight = torch.tensor(centerness(boxes[row].tolist(), *places[index][2:]))
            if kind == "atss":
                logit = outputs["bbox_ctrness"][image, index, 0]
                center = center + F.binary_cross_entropy_with_logits(logit, weight)
            giou = giou + error * (weight if kind == "atss" else 1.0)
            weights = weights + weight
        focal = focal + sigmoid_focal_loss(logits, target, reduction="sum")
    assert positives > 5
    if kind == "poto":
        return {"classification": focal / positives, "box_regression": 2 * giou / positives}
    return {
        "classification": focal / positives,
        "box_regression": 2 * giou / weights,
        "centerness": center / positives,
    }


@pytest.mark.parametrize("kind", ["atss", "poto"])
def test_losses_and_gradients_are_the_papers(kind):
    detector, batch, pyramid = setting(kind, anchor_base=None)
    losses, expected = detector.loss(pyramid, batch), transcription(kind, detector, batch, pyramid)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-6)
        gradients = [torch.autograd.grad(x, pyramid, retain_graph=True) for x in (loss, expected[name])]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1e-3, other.abs().max().item()))


def test_atss_assignment_of_crowded_boxes():
    """Boxes on top of each other, and one that covers everything."""
    detector, batch, pyramid = setting("atss", anchor_base=None)
    middle = torch.tensor([20.3, 30.1, 44.2, 51.7])
    batch.boxes[:4] = torch.stack([middle, middle + 1.3, middle * 0.9, torch.tensor([0.4, 0.2, 63.1, 94.9])])
    found = detector.assign(PaddedBoxes.of(batch), pyramid)
    for image, boxes in enumerate(batch.boxes.split(batch.counts)):
        assert found[image].tolist() == atss_assignment(boxes, locations(pyramid, detector.strides))
    assert set(found[0].tolist()) == {BACKGROUND, 0, 2, 3}  # one of the three on top of each other gets nothing


def test_equal_boxes_of_atss_share_no_location():
    detector, batch, pyramid = setting("atss")
    batch.boxes[1:4] = batch.boxes[0]
    found = detector.assign(PaddedBoxes.of(batch), pyramid)[0]
    assert set(found.tolist()) == {BACKGROUND, 0}


@pytest.mark.parametrize("grid", [(1, 1), (1, 12), (2, 7), (9, 9), (20, 13)], ids=str)
@pytest.mark.parametrize("size", [3, 9])
def test_candidate_cells_hold_the_nearest(grid, size):
    points = torch.rand(30, 2) * torch.tensor([grid[1], grid[0]]) * 8
    found = candidate_cells(points, grid, 8, size)
    assert found.shape == (30, min(size, grid[0]) * min(size, grid[1]))
    y, x = torch.meshgrid(*(torch.arange(n) * 8.0 + 4 for n in grid), indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1)
    for point, own in zip(points, found):
        assert len(own.unique()) == len(own)
        nearest = (cells - point).norm(dim=1).argsort()[:size].tolist()
        within = ((cells - point).abs() < size / 2 * 8).all(1).nonzero()[:, 0].tolist()
        assert set(own.tolist()) >= {*nearest} if size == 9 else set(own.tolist()) >= {*within}


def test_one_to_one_matching_takes_the_best_total():
    places = torch.tensor([[3, 7], [3, 9], [5, 5]])
    quality = torch.tensor([[0.9, 0.8], [0.7, -1.0], [-1.0, -1.0]])
    row, place = match_one_to_one(places, quality)
    assert dict(zip(row.tolist(), place.tolist())) == {0: 7, 1: 3}  # 0.8 + 0.7, and nothing for the third
    row, place = match_one_to_one(places[:0], quality[:0])
    assert len(row) == len(place) == 0


def test_poto_gives_every_box_one_location():
    detector, batch, pyramid = setting("poto")
    outputs = detector.head(pyramid)
    found = detector.assign(PaddedBoxes.of(batch), outputs, pyramid, batch)
    for image, count in enumerate(COUNTS):
        assert sorted(found[image][found[image] >= 0].tolist()) == list(range(count))
    outputs["cls_logits"] = outputs["cls_logits"] * float("nan")
    assert (detector.assign(PaddedBoxes.of(batch), outputs, pyramid, batch) == BACKGROUND).all()


@pytest.mark.parametrize("kind", ["atss", "poto"])
def test_detections_are_the_top_scores(kind):
    detector, batch, pyramid = setting(kind, score_threshold=0.3, nms_threshold=1.0 if kind == "atss" else None)
    with torch.no_grad():
        outputs, found = detector.head(pyramid), detector.detect(pyramid, batch)
    places = locations(pyramid, detector.strides)
    for image, detections in enumerate(found):
        scores = outputs["cls_logits"][image].sigmoid()
        if kind == "atss":
            scores = (scores * outputs["bbox_ctrness"][image].sigmoid()).sqrt()
        best, index = scores.flatten().sort(descending=True)
        count = min(100, int((best > 0.3).sum()))
        assert len(detections) == count > 0
        torch.testing.assert_close(detections.scores, best[:count])
        height, width = batch.image_sizes[image].tolist()
        boxes = boxes_from(
            outputs["bbox_regression"][image][index[:count] // 3], [places[i // 3] for i in index[:count]]
        )
        limit = torch.tensor([width, height, width, height])
        torch.testing.assert_close(detections.boxes, boxes.clamp(min=0).minimum(limit), rtol=1e-4, atol=1e-3)


def test_suppression_is_an_option_of_poto():
    found = {}
    for threshold in (None, 0.5):
        detector, batch, pyramid = setting("poto", score_threshold=0.3, nms_threshold=threshold)
        found[threshold] = detector.detect(pyramid, batch)[0]

    def worst(detections):
        same = detections.labels[:, None] == detections.labels
        return (box_iou(detections.boxes, detections.boxes).fill_diagonal_(0) * same).max()

    assert worst(found[0.5]) <= 0.5 < worst(found[None])


def test_default_thresholds_are_the_papers():
    nms = {kind: build_detector(small_config(kind)).config.nms for kind in ("atss", "poto", "condinst", "fcos")}
    assert nms == {"atss": 0.6, "poto": None, "condinst": 0.6, "fcos": 0.5}
