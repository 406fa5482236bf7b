"""The first stage of Faster R-CNN: proposals from the anchors of P2 .. P6."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from fastkd.detectors.common.dense import PyramidAnchors, clip_boxes
from fastkd.detectors.common.sampling import draw_keys, sample_balanced
from fastkd.detectors.common.targets import IGNORE, PaddedBoxes, avg_factor, inside_ignored, match_anchors
from fastkd.detectors.config import DetectorConfig
from fastkd.types import Batch

SMALLEST_SIDE = 1e-3  # pixels; thinner proposals are dropped, as in torchvision
NMS_THRESHOLD = 0.7


class RPNOutputs(NamedTuple):
    """Logits [B, A] and box deltas [B, A, 4], float32, and the anchors, L tensors [A_l, 4]."""

    logits: Tensor
    deltas: Tensor
    anchors: list[Tensor]

    def split(self, pyramids: int) -> list[RPNOutputs]:
        """The outputs of each of several concatenated pyramids."""
        both = zip(self.logits.unflatten(0, (pyramids, -1)).unbind(), self.deltas.unflatten(0, (pyramids, -1)).unbind())
        return [RPNOutputs(logits, deltas, self.anchors) for logits, deltas in both]


class RegionProposals(nn.Module):
    """torchvision's RPN, with matching, sampling and loss computed for the whole batch at once.

    An anchor is positive from IoU 0.7 or as the best anchor of a box, and background below 0.3. At most half of the
    anchors sampled per image are positive. Binary cross-entropy and smooth L1 (beta 1/9) are divided by the number of
    sampled anchors.
    Source: Faster R-CNN (Ren et al., 2015), as torchvision's RegionProposalNetwork.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.anchors = PyramidAnchors(
            config.anchor_sizes(), config.aspect_ratios(), config.strides, rounding=config.anchor_rounding
        )
        self.head = RPNHead(config.channels, self.anchors.per_cell)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def forward(self, pyramid: list[Tensor]) -> RPNOutputs:
        """Logits and deltas of all anchors, cells in row-major order."""
        logits, deltas = self.head(pyramid)
        batch = len(pyramid[0])
        flat_logits = [level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits]
        flat_deltas = [level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas]
        return RPNOutputs(torch.cat(flat_logits, 1).float(), torch.cat(flat_deltas, 1).float(), self.anchors(pyramid))

    @torch.no_grad()
    def proposals(self, outputs: RPNOutputs, batch: Batch, *, pre_nms: int, post_nms: int) -> list[Tensor]:
        """B tensors [P_b, 4], clipped, strongest first.

        Args:
            pre_nms: maximum number of proposals per level before non-maximum suppression.
            post_nms: maximum number of proposals per image after it.
        """
        sizes = [len(level) for level in outputs.anchors]
        scores, boxes, levels = [], [], []
        parts = zip(outputs.logits.split(sizes, 1), outputs.deltas.split(sizes, 1), outputs.anchors, strict=True)
        for level, (logits, deltas, anchors) in enumerate(parts):
            best, index = logits.topk(min(pre_nms, logits.shape[1]), dim=1)
            chosen = deltas.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = self.box_coder.decode_single(chosen.flatten(0, 1), anchors[index.flatten()])
            scores.append(best)
            boxes.append(decoded.view(*index.shape, 4))
            levels.append(torch.full_like(index, level))
        every_box, every_score, every_level = (
            clip_boxes(torch.cat(boxes, 1), batch),
            torch.cat(scores, 1),
            torch.cat(levels, 1),
        )
        every_score = every_score.sigmoid()
        good = ((every_box[..., 2:] - every_box[..., :2]) >= SMALLEST_SIDE).all(-1)  # also drops NaN
        kept_boxes = []
        for row in range(len(batch)):
            used = good[row].nonzero()[:, 0]
            candidates = every_box[row, used]
            keep = batched_nms(candidates, every_score[row, used], every_level[row, used], NMS_THRESHOLD)
            kept_boxes.append(candidates[keep[:post_nms]])
        return kept_boxes

    def loss(
        self, outputs: RPNOutputs, truth: PaddedBoxes, batch: Batch, generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """Losses "rpn_objectness" and "rpn_box"; anchors of image b are sampled with generators[b]."""
        anchors = torch.cat(outputs.anchors)
        matched = match_anchors(truth, anchors, 0.3, 0.7, keep_best=True)
        labels = torch.where(matched == IGNORE, -1, (matched >= 0).long())
        ignored = inside_ignored(batch, anchors)
        if ignored is not None:
            labels = labels.masked_fill(ignored & (labels == 0), -1)
        keys = draw_keys(generators, [len(anchors)] * len(batch), anchors.device)
        index, taken = sample_balanced(labels, keys, self.config.rpn_samples, 0.5)
        count = avg_factor(taken.sum())
        image, column = taken.nonzero().unbind(1)
        anchor = index[image, column]
        label = labels[image, anchor].float()
        objectness = F.binary_cross_entropy_with_logits(outputs.logits[image, anchor], label, reduction="sum")
        positive = label.nonzero()[:, 0]
        image, anchor = image[positive], anchor[positive]
        target = self.box_coder.encode_single(truth.boxes[image, matched[image, anchor]], anchors[anchor])
        box = F.smooth_l1_loss(outputs.deltas[image, anchor], target, beta=1 / 9, reduction="sum")
        return {"rpn_objectness": objectness / count, "rpn_box": box / count}
