"""Losses and detections computed for a whole batch equal torchvision's, which go image by image."""

import pytest
import torch
from detector_cases import rectangles, small_config
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from fastkd.detectors import build_detector
from fastkd.detectors.common import targets
from fastkd.detectors.common.roi_align import PyramidRoIAlign
from fastkd.detectors.common.sampling import draw_keys, image_generators, sample_balanced
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes, inside_ignored, match_anchors

COUNTS = [4, 0, 1, 7]
SIZE = (128, 128)  # a multiple of the coarsest stride: torchvision's anchors there are ours


class NoBackbone(torch.nn.Module):
    out_channels = 32


def loud(detector):
    """Predictions far from their start, so that every term counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.head.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
    return detector


def torchvision_targets(batch, first_label=0):
    parts = zip(*(x.split(batch.counts) for x in (batch.boxes, batch.labels + first_label, batch.masks)), strict=True)
    return [{"boxes": boxes, "labels": labels, "masks": masks} for boxes, labels, masks in parts]


def image_list(batch):
    return ImageList(batch.images, [tuple(size) for size in batch.image_sizes.tolist()])


def same_detections(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs["scores"]) > 0
        torch.testing.assert_close(ours.scores, theirs["scores"])
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-5, atol=1e-3)
        assert torch.equal(ours.labels, theirs["labels"])


def same_gradients(losses, expected, pyramid):
    for ours, theirs in zip(losses, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for one, other in zip(
            *(torch.autograd.grad(x, pyramid, retain_graph=True, allow_unused=True) for x in (ours, theirs)),
            strict=True,
        ):
            if other is None:
                assert one is None or one.abs().max() == 0
            else:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item() + 1e-8)


def setting(kind, **changes):
    torch.manual_seed(3)
    detector = loud(build_detector(small_config(kind, **changes)))
    batch = rectangles(COUNTS, size=SIZE)
    sides = [-(-SIZE[0] // stride) for stride in detector.strides]
    pyramid = [torch.randn(len(COUNTS), detector.channels, side, side, requires_grad=True) for side in sides]
    return detector, batch, pyramid


@pytest.mark.parametrize("chunk", [1 << 24, 1000], ids=["whole", "in chunks"])
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_losses_are_torchvisions(kind, chunk, monkeypatch):
    monkeypatch.setattr(targets, "MAX_PAIRS", chunk)
    monkeypatch.setattr("fastkd.detectors.fcos.MAX_PAIRS", chunk)
    detector, batch, pyramid = setting(kind, anchor_base=None)
    original = {"retinanet": RetinaNet, "fcos": FCOS}[kind](NoBackbone(), 3, head=detector.head)
    anchors = original.anchor_generator(image_list(batch), pyramid)
    assert torch.equal(anchors[0], torch.cat(detector.anchors(pyramid)))
    sizes = [] if kind == "retinanet" else [[len(level) for level in detector.anchors(pyramid)]]
    expected = original.compute_loss(torchvision_targets(batch), detector.head(pyramid), anchors, *sizes)
    losses = detector.loss(pyramid, batch)
    assert list(losses) == ["classification", "box_regression"] + ["centerness"] * (kind == "fcos")
    assert len(losses) == len(expected)
    same_gradients(losses.values(), expected.values(), pyramid)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_detections_are_torchvisions(kind):
    detector, batch, pyramid = setting(kind, anchor_base=None, score_threshold=0.3, candidates_per_level=150)
    batch.image_sizes = torch.tensor([[128, 128], [100, 128], [128, 90], [77, 64]])
    original = {"retinanet": RetinaNet, "fcos": FCOS}[kind](
        NoBackbone(),
        3,
        head=detector.head,
        score_thresh=0.3,
        nms_thresh=0.5,
        detections_per_img=100,
        topk_candidates=150,
    )
    with torch.no_grad():
        sizes = [len(level) for level in detector.anchors(pyramid)]
        outputs = {name: list(value.split(sizes, 1)) for name, value in detector.head(pyramid).items()}
        anchors = [detector.anchors(pyramid)] * len(batch)
        expected = original.postprocess_detections(outputs, anchors, batch.image_sizes.tolist())
        same_detections(detector.detect(pyramid, batch), expected)


def torchvision_rpn(detector, everything):
    config, rpn = detector.config, detector.head.rpn
    generator = AnchorGenerator(tuple(config.anchor_sizes()), (config.aspect_ratios(),) * 5)
    tops = {"training": 80, "testing": 60}, {"training": 30, "testing": 20}
    return RegionProposalNetwork(generator, rpn.head, 0.7, 0.3, everything, 0.5, *tops, nms_thresh=0.7)


def test_rpn_is_torchvisions():
    """Samples so large that all anchors are in them, so that no draw matters."""
    detector, batch, pyramid = setting("faster_rcnn", rpn_samples=20000)
    rpn = detector.head.rpn
    original = torchvision_rpn(detector, 20000)
    named = {str(level): x for level, x in enumerate(pyramid)}
    outputs = rpn(pyramid)
    for training, pre_nms, post_nms in ((True, 80, 30), (False, 60, 20)):
        proposals, losses = original.train(training)(image_list(batch), named, torchvision_targets(batch))
        ours = rpn.proposals(outputs, batch, pre_nms=pre_nms, post_nms=post_nms)
        for one, other in zip(ours, proposals, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
        if training:
            mine = rpn.loss(outputs, PaddedBoxes.of(batch), batch, image_generators(batch))
            same_gradients(mine.values(), losses.values(), pyramid)


def torchvision_heads(detector, everything):
    own = detector.head.roi_heads
    pools = [MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2, canonical_scale=28) for size in (7, 14)]
    settings = (0.5, 0.5, everything, 0.5, None, detector.config.score_threshold, 0.5, 100)
    masks = (pools[1], own.mask_head, own.mask_predictor)
    return RoIHeads(pools[0], own.box_head, own.box_predictor, *settings, *masks)


def some_proposals(batch):
    generator = torch.Generator().manual_seed(4)
    found = []
    for boxes in batch.boxes.split(batch.counts):
        near = boxes.repeat(5, 1) + 4 * torch.randn(5 * len(boxes), 4, generator=generator)
        corner = 90 * torch.rand(20, 2, generator=generator)
        far = torch.cat([corner, corner + 3 + 30 * torch.rand(20, 2, generator=generator)], 1)
        boxes = torch.cat([near, far]).clamp(0, 128)
        found.append(torch.cat([boxes[:, :2].minimum(boxes[:, 2:] - 2), boxes[:, 2:]], 1).clamp(min=0))
    return found


def test_region_heads_are_torchvisions():
    detector, batch, pyramid = setting("mask_rcnn", roi_samples=400, roi_positive_fraction=0.5, score_threshold=0.3)
    original, proposals = torchvision_heads(detector, 400), some_proposals(batch)
    named, sizes = {str(level): x for level, x in enumerate(pyramid)}, image_list(batch).image_sizes
    expected = original.train()(named, list(proposals), sizes, torchvision_targets(batch, 1))[1]
    heads = detector.head.roi_heads
    truth = PaddedBoxes.of(batch)
    sample = heads.sample(proposals, truth, batch, image_generators(batch))
    (losses,) = heads.losses(pyramid, [sample], truth, batch)
    same_gradients(losses.values(), expected.values(), pyramid)

    batch.image_sizes = torch.tensor([[128, 128], [100, 128], [128, 90], [77, 64]])
    with torch.no_grad():
        results = original.eval()(named, list(proposals), batch.image_sizes.tolist())[0]
        found = heads.detect(pyramid, proposals, batch)
    same_detections(found, [result | {"labels": result["labels"] - 1} for result in results])
    for ours, theirs, size in zip(found, results, batch.image_sizes.tolist(), strict=True):
        masks = paste_masks_in_image(theirs["masks"], theirs["boxes"], tuple(size))[:, 0] > 0.5
        assert (ours.masks != masks).float().mean() < 1e-4


def test_region_heads_without_any_proposal_or_box():
    detector, _, pyramid = setting("mask_rcnn")
    batch = rectangles([0] * 4, size=SIZE)
    proposals = [torch.zeros(0, 4)] * 4
    heads = detector.head.roi_heads
    truth = PaddedBoxes.of(batch)
    sample = heads.sample(proposals, truth, batch, image_generators(batch))
    (losses,) = heads.losses(pyramid, [sample], truth, batch)
    assert all(loss == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in heads.parameters())
    assert [len(detections) for detections in heads.detect(pyramid, proposals, batch)] == [0] * 4


def test_proposals_are_finite_whatever_the_head_says():
    detector, batch, pyramid = setting("faster_rcnn")
    outputs = detector.head.rpn(pyramid)
    outputs.deltas[:, ::2] = float("nan")
    outputs.deltas[:, 1::4] = float("inf")
    for proposals in detector.head.rpn.proposals(outputs, batch, pre_nms=50, post_nms=20):
        assert proposals.isfinite().all()
        assert (proposals[:, 2:] > proposals[:, :2]).all()


@pytest.mark.parametrize("size", [7, 14])
def test_roi_align_is_torchvisions(size):
    torch.manual_seed(2)
    pyramid = [torch.randn(3, 8, 96 // stride, 64 // stride, requires_grad=True) for stride in (4, 8, 16, 32)]
    corner = 100 * torch.rand(40, 2) - 20
    boxes = torch.cat([corner, corner + 60 * torch.rand(40, 2).square()], 1)  # also outside and smaller than a cell
    boxes = list(boxes.split([25, 0, 15]))
    ours = PyramidRoIAlign(size, 28)(pyramid, boxes)
    original = MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2, canonical_scale=28)
    theirs = original({str(level): x for level, x in enumerate(pyramid)}, boxes, [(96, 64)] * 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(theirs)
    for one, other in zip(*(torch.autograd.grad(x, pyramid, direction) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_box_that_touches_no_anchor_claims_none():
    truth = PaddedBoxes(
        torch.tensor([[[500.0, 500.0, 510.0, 510.0], [1.0, 1.0, 4.0, 4.0]]]),
        torch.zeros(1, 2).long(),
        torch.ones(1, 2).bool(),
    )
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    assert match_anchors(truth, anchors, 0.4, 0.5, keep_best=True).tolist() == [[1, BACKGROUND]]


def test_inside_ignored_is_more_than_half_of_an_anchor_in_its_own_image():
    batch = rectangles([0, 0])
    anchors = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [6.0, 0.0, 16.0, 10.0], [40.0, 40.0, 50.0, 50.0]]
    )
    assert inside_ignored(batch, anchors) is None
    batch.ignore_boxes = torch.tensor([[0.0, 0.0, 10.0, 60.0], [30.0, 30.0, 60.0, 60.0]])
    batch.ignore_index = torch.tensor([1, 1])
    assert inside_ignored(batch, anchors).tolist() == [[False] * 4, [True, False, False, True]]


def test_samples_obey_the_rule_and_do_not_depend_on_neighbours():
    batch = rectangles([0, 0, 0])
    labels = torch.full((3, 400), -1)
    labels[:, :300] = 0
    labels[0, :20] = 1
    labels[1, :3] = 1
    labels[2, 5:] = -1
    counts = [400, 350, 300]
    keys = draw_keys(image_generators(batch), counts, labels.device)
    index, taken = sample_balanced(labels, keys, 16, 0.5)
    chosen = [index[image][taken[image]] for image in range(3)]
    assert [len(own.unique()) for own in chosen] == [16, 16, 5]
    assert [int((labels[image, own] == 1).sum()) for image, own in enumerate(chosen)] == [8, 3, 0]
    assert all((labels[image, own] >= 0).all() for image, own in enumerate(chosen))

    batch = rectangles([0])
    batch.seeds = [2]  # the third image alone
    alone, kept = sample_balanced(labels[2:, :300], draw_keys(image_generators(batch), [300], labels.device), 16, 0.5)
    assert sorted(alone[kept].tolist()) == sorted(chosen[2].tolist())
