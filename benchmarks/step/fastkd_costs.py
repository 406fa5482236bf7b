"""Floating-point operations of fastkd's compiled ops for the dispatch ledger, two per multiply-add.

Products are counted exactly, elementwise arithmetic as a number of operations per element (torch counts none for its
elementwise operators, to the disadvantage of the compiled ops). Formulas take an op's arguments by name and its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Formula = Callable[[dict[str, Any], Any], int]

# arguments read a second time from memory, after a pass for statistics
READ_TWICE = {"norm_relu_box_pool": ("levels",)}


def _elements(levels: list[Tensor]) -> int:
    return sum(level.numel() for level in levels)


def _cells(levels: list[Tensor]) -> int:
    """Cells of all images and levels."""
    return sum(level.shape[0] * level.shape[2] * level.shape[3] for level in levels)


def _each(argument: str, operations: int) -> Formula:
    """A formula with `operations` operations per element of a list of tensors."""
    return lambda bound, result: operations * _elements(bound[argument])


def _each_made(operations: int) -> Formula:
    return lambda bound, result: operations * _elements([result] if isinstance(result, Tensor) else result)


def _logits(bound: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds per cell of the logits: key projection (0 if absorbed in the queries), and q k."""
    _, heads, count, depth = bound["queries"].shape
    weight = bound["key_weight"]
    return 0 if weight is None else weight.numel(), heads * count * depth


def _attention(bound: dict[str, Any], result: Any) -> int:
    projection, product = _logits(bound)
    values = bound["values"][0].shape[1] * bound["queries"].shape[2]  # G d_v N
    return 2 * _cells(bound["levels"]) * (projection + product + values)


def _attention_backward(bound: dict[str, Any], result: Any) -> int:
    projection, product = _logits(bound)
    values = bound["values"][0].shape[1] * bound["queries"].shape[2]
    total = projection + product + values  # recomputed logits, dP
    if bound["for_values"]:
        total += values
    if bound["for_keys"]:
        total += product + (product + projection if projection else 0)  # dQ; dK and the weight gradient
    return 2 * _cells(bound["levels"]) * total


def _mass(bound: dict[str, Any], result: Any) -> int:
    passes = 2 if bound.get("logsumexp") is None else 1
    return 2 * passes * _cells(bound["levels"]) * sum(_logits(bound))


def _imitation(bound: dict[str, Any], result: Any) -> int:
    """Upper bound: every box with every anchor."""
    sizes = bound["level_sizes"]
    pairs = zip(bound["anchors"], sizes[::2], sizes[1::2])
    return 14 * len(bound["boxes"]) * sum(len(anchors) * rows * columns for anchors, rows, columns in pairs)


def _pyramid_of(bound: dict[str, Any], result: Any) -> int:
    """Two operations per element of the pyramid that is pooled or painted."""
    sides = [side for side in (bound, result) for side in torch.utils._pytree.tree_leaves(side)]
    return 2 * sum(tensor.numel() for tensor in sides if isinstance(tensor, Tensor) and tensor.dim() == 4)


def _taps(bound: dict[str, Any], result: Any) -> int:
    """The product of rows and weight forward, and one product per required gradient backward."""
    rows, weight = bound["embeddings"].shape[0], bound["weight"].numel()
    return 2 * rows * weight * (bound.get("for_embeddings", True) + bound.get("for_weight", False))


FLOPS: dict[str, Formula] = {
    "attention_mass": _mass,
    "box_paint": _pyramid_of,
    "box_paint_backward": _pyramid_of,
    "box_paint_conv3x3": _each_made(2),
    "box_paint_conv3x3_backward": _each("grads", 2),
    "box_pool": _pyramid_of,
    "box_pool_backward": _pyramid_of,
    "conv3x3_taps": _taps,
    "conv3x3_taps_backward": _taps,
    "focal_loss": lambda bound, result: 40 * bound["logits"].numel(),
    "focal_loss_backward": lambda bound, result: 42 * bound["logits"].numel(),
    "imitation_mask": _imitation,
    "instance_attention": _attention,
    "instance_attention_backward": _attention_backward,
    "instance_norm_mse": _each("student", 10),
    "instance_norm_mse_backward": _each_made(8),
    "mask_paint": _pyramid_of,
    "mask_paint_backward": _pyramid_of,
    "mask_pool": _pyramid_of,
    "mask_pool_backward": _pyramid_of,
    "masked_mse": _each("student", 3),
    "masked_mse_backward": _each_made(3),
    "norm_relu_box_pool": _each("levels", 6),
    "norm_relu_box_pool_backward": _each_made(8),
    "seeded_noise": lambda bound, result: 0,
    "value_mimic": _each("student", 14),
    "value_mimic_backward": _each_made(18),
}
