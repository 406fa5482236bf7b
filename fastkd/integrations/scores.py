"""Class scores of a teacher's cells, for score-weighted L2; packages are recognised by attributes, not imported."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Scores = Callable[[list[Tensor]], list[Tensor]]


def cell_scores(model: Any) -> Scores | None:
    """A function of a detector's levels -> L tensors [B, 1, H_l, W_l]: the highest probability of any class.

    Two-stage detectors return the highest objectness of a cell's anchors. None for detectors whose cells have no scores
    (DETR, Deformable DETR) and for unknown modules without a method `cell_scores`.
    """
    base = getattr(model, "model", None)
    if hasattr(model, "cell_scores"):
        return model.cell_scores
    if hasattr(model, "transform") and hasattr(model, "backbone"):
        return _maps_of(model.rpn.head) if hasattr(model, "rpn") else functools.partial(_of_torchvision, model)
    if hasattr(base, "enc_score_head"):
        return functools.partial(_of_transformers, base)
    if hasattr(model, "preprocess_image"):  # detectron2
        return _maps_of(getattr(model, "head", None) or getattr(model.proposal_generator, "rpn_head", None))
    if hasattr(model, "extract_feat"):  # mmdetection
        dense = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
        return _maps_of(dense) if getattr(dense, "use_sigmoid_cls", False) else None
    return None


def _maps_of(head: Any) -> Scores | None:
    return None if head is None else functools.partial(_of_maps, head)


def highest(logits: Sequence[Tensor]) -> list[Tensor]:
    """L tensors [B, A * classes, H_l, W_l] -> [B, 1, H_l, W_l] float32 in [0, 1]."""
    return [level.amax(1, keepdim=True).float().sigmoid() for level in logits]


def _of_maps(head: Any, levels: list[Tensor]) -> list[Tensor]:
    """Of a head that returns (logits of each level, ...)."""
    return highest(head(levels)[0])


def _of_torchvision(model: Any, levels: list[Tensor]) -> list[Tensor]:
    """Of RetinaNet, FCOS and SSD, whose classification heads return logits [B, H_1 * W_1 * A_1 + ..., classes]."""
    head = model.head.classification_head
    logits = head(levels).float()
    is_ssd = hasattr(head, "num_columns")  # softmax over the classes and a background
    scores = logits.softmax(2)[..., 1:].amax(2) if is_ssd else logits.amax(2).sigmoid()
    sizes = [tuple(level.shape[2:]) for level in levels]
    anchors = model.anchor_generator.num_anchors_per_location()
    counts = [rows * columns * each for (rows, columns), each in zip(sizes, anchors, strict=True)]
    parts = zip(scores.split(counts, dim=1), sizes, strict=True)
    return [part.unflatten(1, (1, *size, -1)).amax(4) for part, size in parts]


def _of_transformers(base: Any, levels: list[Tensor]) -> list[Tensor]:
    """Of RT-DETR, RT-DETRv2 and D-FINE: of their scores for choosing the decoder's queries."""
    sources = [project(level) for project, level in zip(base.decoder_input_proj, levels)]
    sizes = tuple(tuple(source.shape[2:]) for source in sources)
    memory = [source.flatten(2).transpose(1, 2) for source in sources]  # [B, H_l * W_l, C]
    _, valid = base.generate_anchors(sizes, device=memory[0].device, dtype=memory[0].dtype)  # [1, cells, 1]
    masks = valid.to(memory[0].dtype).split([len(part[0]) for part in memory], dim=1)
    logits = [base.enc_score_head(base.enc_output(mask * part)) for mask, part in zip(masks, memory, strict=True)]
    return highest([part.transpose(1, 2).unflatten(2, size) for part, size in zip(logits, sizes, strict=True)])


def of_ultralytics(head: Any, levels: list[Tensor]) -> list[Tensor]:
    """Of a YOLO's detection head."""
    branches = head.one2one_cv3 if head.cv3 is None else head.cv3  # a fused YOLO26 has no one-to-many branch
    return highest([branch(level) for branch, level in zip(branches, levels, strict=True)])
