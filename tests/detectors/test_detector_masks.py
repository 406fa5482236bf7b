"""CondInst and SOLOv2 against slow transcriptions that go instance by instance."""

import math

import pytest
import torch
import torch.nn.functional as F
from detector_cases import rectangles, small_config
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from fastkd.detectors import build_detector
from fastkd.detectors.common import instance_masks
from fastkd.detectors.common.instance_masks import aligned_upsample, coarse_masks, dice_loss
from fastkd.detectors.common.locations import Matches
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes
from fastkd.detectors.condinst_head import PARAMETERS, dynamic_masks
from fastkd.detectors.solov2_detect import boxes_of, matrix_nms, point_max

COUNTS = [3, 0, 2]
SIZE = (96, 64)


def setting(kind, size=SIZE, **changes):
    torch.manual_seed(3)
    detector = build_detector(small_config(kind, head_convs=1, **changes))
    with torch.no_grad():
        for parameter in detector.head.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape))
    batch = rectangles(COUNTS, size=size)
    strides = detector.strides
    pyramid = [torch.randn(3, 32, -(-size[0] // s), -(-size[1] // s), requires_grad=True) for s in strides]
    return detector, batch, pyramid


def same_losses(losses, expected, pyramid):
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-6)
        gradients = [
            torch.autograd.grad(x, pyramid, retain_graph=True, materialize_grads=True) for x in (loss, expected[name])
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1e-3, other.abs().max().item()))


def dice(logits, target):
    p, t = logits.sigmoid(), target.float()
    return 1 - 2 * (p * t).sum() / ((p * p).sum() + (t * t).sum() + 1e-5)


def per_instance(batch):
    """(boxes, labels, masks at stride 4) of each image."""
    coarse = batch.masks[:, 2::4, 2::4]
    return list(zip(*(values.split(batch.counts) for values in (batch.boxes, batch.labels, coarse))))


def enlarged(maps, factor):
    """aligned_upsample by its formula: output cell i reads input position (i - factor // 2) / factor, rims repeated."""
    for dim in (-2, -1):
        cells = maps.shape[dim]
        place = ((torch.arange(cells * factor) - factor // 2) / factor).clamp(0, cells - 1)
        low = place.long()
        share = (place - low).to(maps.dtype).view(-1, *[1] * (-1 - dim))
        high = (low + 1).clamp(max=cells - 1)
        maps = maps.index_select(dim, low) * (1 - share) + maps.index_select(dim, high) * share
    return maps


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 3)], ids=str)
def test_aligned_upsampling(shape, factor):
    maps = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(aligned_upsample(maps, factor), enlarged(maps, factor))


def test_dice_loss_leaves_out_what_lies_beyond_the_targets():
    logits, targets = torch.randn(2, 5, 6), torch.rand(2, 4, 6) > 0.5
    expected = torch.stack([dice(x[:4], t) for x, t in zip(logits, targets)])
    torch.testing.assert_close(dice_loss(logits, targets), expected)


def slow_mask_head(features, parameters, origin, scale):
    """One instance's three layers, cell by cell, on [x, y | features]."""
    w1, w2, w3, b1, b2, b3 = parameters.split([80, 64, 8, 8, 8, 1])
    height, width = features.shape[1:]
    rows = []
    for y in range(height):
        for x in range(width):
            place = torch.stack([(8 * x + 4 - origin[0]) / scale, (8 * y + 4 - origin[1]) / scale])
            cell = torch.cat([place, features[:, y, x]])
            hidden = F.relu(w1.view(8, 10) @ cell + b1)
            hidden = F.relu(w2.view(8, 8) @ hidden + b2)
            rows.append(w3.view(1, 8) @ hidden + b3)
    return torch.cat(rows).view(height, width)


def test_dynamic_masks_are_three_convolutions():
    assert PARAMETERS == 169
    features, parameters = torch.randn(8, 3, 4), torch.randn(2, 169)
    origins, scales = torch.tensor([[4.0, 12.0], [20.0, 4.0]]), torch.tensor([64.0, 128.0])
    found = dynamic_masks(features, parameters, origins, scales, 8)
    for index in range(2):
        expected = slow_mask_head(features, parameters[index], origins[index], scales[index])
        torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-4)


def condinst_match(boxes, stride, level, x, y):
    """FCOS's rule with anchor_base 4: ranges 16, 32, 64, 128 pixels between the levels."""
    best, area = BACKGROUND, float("inf")
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        sides = (x - x1, y - y1, x2 - x, y2 - y)
        near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
        lower = 0 if level == 0 else 2 * stride
        upper = float("inf") if level == 4 else 4 * stride
        if min(sides) > 0 and near and lower < max(sides) < upper and (x2 - x1) * (y2 - y1) < area:
            best, area = number, (x2 - x1) * (y2 - y1)
    return best


def condinst_transcription(detector, batch, pyramid):
    outputs = detector.head(pyramid)
    focal = giou = center = mask = torch.zeros(())
    positives = 0
    for image, (boxes, labels, masks) in enumerate(per_instance(batch)):
        target, index = torch.zeros_like(outputs["cls_logits"][image]), -1
        for level, (maps, stride) in enumerate(zip(pyramid, detector.strides)):
            for cell in range(maps.shape[-2] * maps.shape[-1]):
                index += 1
                x, y = (stride * n + stride // 2 for n in (cell % maps.shape[-1], cell // maps.shape[-1]))
                row = condinst_match(boxes, stride, level, x, y)
                if row == BACKGROUND:
                    continue
                positives += 1
                box = boxes[row]
                target[index, labels[row]] = 1
                sides = outputs["bbox_regression"][image, index] * stride
                point = torch.tensor([x, y, x, y])
                giou = giou + generalized_box_iou_loss(point + sides * torch.tensor([-1, -1, 1, 1]), box)
                left, top, right, bottom = ((point - box) * torch.tensor([1, 1, -1, -1])).unbind()
                ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
                logit = outputs["bbox_ctrness"][image, index, 0]
                center = center + F.binary_cross_entropy_with_logits(logit, ratio.sqrt())
                features, own = outputs["mask_features"][image], outputs["controller"][image, index]
                logits = slow_mask_head(features, own, point[:2].float(), 4.0 * stride)
                mask = mask + dice(enlarged(logits, 2), masks[row])
        focal = focal + sigmoid_focal_loss(outputs["cls_logits"][image], target, reduction="sum")
    assert positives > 5
    sums = {"classification": focal, "box_regression": giou, "centerness": center, "mask": mask}
    return {name: value / positives for name, value in sums.items()}


def test_condinst_losses_are_the_papers():
    detector, batch, pyramid = setting("condinst", size=(32, 40))
    same_losses(detector.loss(pyramid, batch), condinst_transcription(detector, batch, pyramid), pyramid)


def test_condinst_mask_features_are_levels_summed_at_stride_8():
    detector, _, pyramid = setting("condinst")
    branch = detector.head.mask_branch.eval()
    total = sum(enlarged(branch.refine[i](pyramid[i]), 2**i) if i else branch.refine[0](pyramid[0]) for i in range(3))
    torch.testing.assert_close(branch(pyramid), branch.tower(total), rtol=1e-4, atol=1e-4)
    assert isinstance(branch.refine[0][1], torch.nn.BatchNorm2d)
    grouped = build_detector(small_config("condinst", head_norm="gn")).head.mask_branch
    assert isinstance(grouped.refine[0][1], torch.nn.GroupNorm)


def test_condinst_draws_its_masks_from_the_seeds():
    detector, batch, pyramid = setting("condinst", mask_samples=4)
    matches = Matches.of(detector.assign(PaddedBoxes.of(batch), detector.anchors(pyramid)))
    first = detector._sampled(matches, batch)
    image, place, row = first
    assert len(image) == 4 < len(matches.image) and (image.diff() >= 0).all()
    assert torch.equal(matches.rows[image, place], row) and (row >= 0).all()
    assert torch.equal(torch.stack(detector._sampled(matches, batch)), torch.stack(first))
    batch.seeds = [seed + 1 for seed in batch.seeds]
    assert not torch.equal(torch.stack(detector._sampled(matches, batch)), torch.stack(first))
    assert detector.loss(pyramid, batch)["mask"].isfinite()


def test_condinst_detections_carry_their_own_masks(monkeypatch):
    monkeypatch.setattr("fastkd.detectors.condinst.MASKS_AT_ONCE", 3)
    detector, batch, pyramid = setting("condinst", score_threshold=0.3, detections_per_image=7)
    batch.image_sizes[1] = torch.tensor([70, 50])
    with torch.no_grad():
        outputs, found = detector.head(pyramid), detector.detect(pyramid, batch)
        scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
    anchors = torch.cat(detector.anchors(pyramid))
    for image, (detections, size) in enumerate(zip(found, batch.image_sizes.tolist())):
        assert len(detections) == 7 and detections.masks.shape == (7, *size)
        for score, label, mask in zip(detections.scores, detections.labels, detections.masks):
            place = int((scores[image, :, label] - score).abs().argmin())
            origin = (anchors[place, :2] + anchors[place, 2:]) / 2
            scale = 4 * (anchors[place, 2] - anchors[place, 0])
            logits = slow_mask_head(outputs["mask_features"][image], outputs["controller"][image, place], origin, scale)
            soft = aligned_upsample(aligned_upsample(logits[None, None], 2).sigmoid(), 4)[0, 0]
            assert ((soft[: size[0], : size[1]] > 0.5) != mask).float().mean() < 1e-3


def solov2_assignment(detector, boxes, masks):
    """The instance of each cell, by the paper's text, for anchor_base 4."""
    height, width = SIZE
    found = []
    for level, (cells, stride) in enumerate(zip(detector.config.grids, detector.strides)):
        grid = [[(float("inf"), BACKGROUND)] * cells for _ in range(cells)]
        for number, ((x1, y1, x2, y2), mask) in enumerate(zip(boxes.tolist(), masks)):
            area = (x2 - x1) * (y2 - y1)
            lower, upper = 2 * stride if level else 0, 8 * stride if level < 4 else float("inf")
            if not lower <= math.sqrt(area) <= upper or not mask.any():
                continue
            rows, columns = mask.nonzero().float().add(0.5).mean(0).tolist()

            def span(middle, half, length, cells=cells):
                at = [math.floor(p / length * cells) for p in (middle - half, middle, middle + half)]
                return range(max(0, at[0], at[1] - 1), min(cells - 1, at[2], at[1] + 1) + 1)

            for y in span(rows, 0.1 * (y2 - y1), height):
                for x in span(columns, 0.1 * (x2 - x1), width):
                    grid[y][x] = min(grid[y][x], (area, number))
        found += [number for line in grid for _, number in line]
    return found


def solov2_transcription(detector, batch, pyramid):
    outputs = detector.head(pyramid)
    focal = mask = torch.zeros(())
    positives = 0
    whole = batch.masks.split(batch.counts)
    for image, (boxes, labels, masks) in enumerate(per_instance(batch)):
        logits, kernels, features = (outputs[name][image] for name in ("cls_logits", "kernels", "mask_features"))
        target = torch.zeros_like(logits)
        for cell, row in enumerate(solov2_assignment(detector, boxes, whole[image])):
            if row != BACKGROUND:
                positives += 1
                target[cell, labels[row]] = 1
                mask = mask + dice(torch.einsum("c,chw->hw", kernels[cell], features), masks[row])
        focal = focal + sigmoid_focal_loss(logits, target, reduction="sum")
    assert positives > 5
    return {"classification": focal / (positives + 1), "mask": 3 * mask / positives}


@pytest.mark.parametrize("grids", [(8, 6, 4, 3, 2), (24, 18, 12, 8, 6)], ids=str)
def test_solov2_losses_are_the_papers(grids):
    detector, batch, pyramid = setting("solov2", grids=grids)
    batch.masks[0, : SIZE[0] // 2] = False  # centre of mass away from the box's centre
    batch.masks[1] = False  # nothing of it is seen
    same_losses(detector.loss(pyramid, batch), solov2_transcription(detector, batch, pyramid), pyramid)


def test_solov2_head_has_the_papers_shapes():
    detector, _, pyramid = setting("solov2")
    outputs = detector.head(pyramid)
    cells = sum(side**2 for side in (8, 6, 4, 3, 2))
    assert outputs["cls_logits"].shape == (3, cells, 3) and outputs["kernels"].shape == (3, cells, 16)
    assert outputs["mask_features"].shape == (3, 16, SIZE[0] // 4, SIZE[1] // 4)
    towers = detector.head.instance_head
    assert towers.kernel_tower[0].in_channels == 34 and towers.class_tower[0].in_channels == 32
    assert [len(path) for path in detector.head.mask_head.paths] == [1, 1, 2, 3]
    with torch.no_grad():  # an image of constant features differs from cell to cell by its coordinates alone
        flat = [torch.ones_like(level) for level in pyramid]
        kernels, logits = (towers(flat)[i][0, :64] for i in (1, 0))
    assert kernels.std(0).max() > 1e-4
    middle = logits.view(8, 8, 3)[3:5, 3:5].flatten(0, 1)
    torch.testing.assert_close(middle, middle[:1].expand(4, 3), rtol=1e-4, atol=1e-5)


def test_solov2_odd_sizes():
    detector, _, _ = setting("solov2")
    batch = rectangles(COUNTS, size=(67, 45))
    pyramid = detector.features(batch.images)
    losses = detector.loss(pyramid, batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(found.masks.shape[1:] == (67, 45) for found in detector.eval().detect(pyramid, batch))


def test_matrix_nms_is_the_papers():
    masks = (torch.rand(7, 40) > 0.4).float()
    masks[3], masks[5] = masks[0], masks[0]
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 0])

    def iou(i, j):
        both = (masks[i] * masks[j]).sum()
        return float(both / (masks[i].sum() + masks[j].sum() - both)) if labels[i] == labels[j] else 0.0

    expected = []
    for j in range(7):
        factors = [1.0]
        for i in range(j):
            worst = max([iou(k, i) for k in range(i)], default=0.0)
            factors.append(math.exp(-2 * iou(i, j) ** 2) / math.exp(-2 * worst**2))
        expected.append(min(factors))
    torch.testing.assert_close(matrix_nms(masks, labels), torch.tensor(expected))
    assert matrix_nms(masks, labels)[3] == pytest.approx(math.exp(-2)) and len(matrix_nms(masks[:0], labels[:0])) == 0


def test_point_max_keeps_peaks():
    scores = torch.tensor([[[0.1, 0.2, 0.3], [0.6, 0.5, 0.1], [0.2, 0.4, 0.45]]])
    expected = torch.tensor([[[0.1, 0.2, 0.3], [0.6, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(point_max(scores), expected)


def test_boxes_of_masks():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 1:7], masks[2, 5, 7] = True, True
    boxes, seen = boxes_of(masks)
    assert seen.tolist() == [True, False, True]
    assert boxes[seen].tolist() == [[1, 2, 7, 4], [7, 5, 8, 6]]
    assert boxes_of(masks[:0])[0].shape == (0, 4)


def slow_solov2(outputs, config, size):
    """Detections (score, label, mask) of one image as the paper's inference goes."""
    logits, kernels, features = outputs["cls_logits"], outputs["kernels"], outputs["mask_features"]
    candidates, first = [], 0
    for side, stride in zip(config.grids, (8, 8, 16, 32, 32)):
        scores = logits[first : first + side * side].sigmoid().view(side, side, -1)
        for y in range(side):
            for x in range(side):
                for label in range(scores.shape[-1]):
                    block = scores[max(0, y - 1) : y + 1, max(0, x - 1) : x + 1, label]
                    score = scores[y, x, label]
                    if score < block.max() or score <= 2 * config.score_threshold:
                        continue
                    soft = torch.einsum("c,chw->hw", kernels[first + y * side + x], features).sigmoid()
                    inside = soft > 0.5
                    if inside.sum() > stride:
                        candidates.append((float(score * soft[inside].mean()), label, soft))
        first += side * side
    candidates.sort(key=lambda c: -c[0])
    masks = torch.stack([(soft > 0.5).float().flatten() for _, _, soft in candidates])
    factors = matrix_nms(masks, torch.tensor([label for _, label, _ in candidates]))
    found = []
    for (score, label, soft), factor in zip(candidates, factors.tolist()):
        if score * factor > config.score_threshold:
            whole = F.interpolate(soft[None, None], scale_factor=4, mode="bilinear")[0, 0, : size[0], : size[1]] > 0.5
            found.append((score * factor, label, whole))
    return sorted((entry for entry in found if entry[2].any()), key=lambda c: -c[0])


def test_solov2_detections_are_the_papers():
    detector, batch, pyramid = setting("solov2", score_threshold=0.2, detections_per_image=60)
    batch.image_sizes[1] = torch.tensor([70, 50])
    with torch.no_grad():
        detector.head.instance_head.kernels.weight *= 20  # masks that differ
        outputs = detector.head(pyramid)
        found = detector.detect(pyramid, batch)
    for image, size in enumerate(batch.image_sizes.tolist()):
        own = {name: value[image] for name, value in outputs.items()}
        expected = slow_solov2(own, detector.config, size)[:60]
        assert len(expected) == len(found[image]) > 3
        torch.testing.assert_close(found[image].scores, torch.tensor([score for score, _, _ in expected]))
        assert found[image].labels.tolist() == [label for _, label, _ in expected]
        for mask, box, (_, _, whole) in zip(found[image].masks, found[image].boxes, expected):
            assert (mask != whole).float().mean() < 1e-3
            y, x = mask.nonzero().unbind(1)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_masks_at_stride_4_are_cell_centres():
    batch = rectangles([1], size=(67, 45))
    assert coarse_masks(batch).shape == (1, 17, 11)
    assert torch.equal(coarse_masks(batch)[0, 3, 5], batch.masks[0, 14, 22])
    assert instance_masks.MASK_STRIDE == 4
