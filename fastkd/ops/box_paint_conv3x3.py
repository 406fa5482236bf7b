"""box_paint_conv3x3: a 3x3 convolution of painted boxes (LGD, methods 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fastkd.ops.box_paint import box_paint_reference
from fastkd.ops.checks import check_boxes, check_device, check_embeddings, check_size, check_tensor


def box_paint_conv3x3_reference(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boxes: Tensor,
    image_index: Tensor,
    image_size: tuple[int, int],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Plain torch of `box_paint_conv3x3`."""
    painted = box_paint_reference(embeddings, boxes, image_index, image_size, batch_size, level_sizes)
    return [F.conv2d(level, weight, bias, padding=1) for level in painted]


def box_paint_conv3x3(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boxes: Tensor,
    image_index: Tensor,
    image_size: tuple[int, int],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """conv3x3 (zero padding 1) of the pyramid that `box_paint` makes.

    Args:
        embeddings: [L, K, C], floating point; receives gradients.
        weight: [C_out, C, 3, 3], shared by the levels; receives gradients.
        bias: [C_out] or None; receives gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, batch_size).
        image_size: (H, W) of the padded batch, pixels.
        batch_size: B.
        level_sizes: L pairs (H_l, W_l).
    Returns: L tensors [B, C_out, H_l, W_l].
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), intra-object knowledge mapper.
    """
    op = "box_paint_conv3x3"
    check_boxes(op, boxes, image_index)
    check_size(op, "image_size", image_size)
    check_embeddings(op, embeddings, boxes.shape[0], level_sizes)
    check_tensor(op, "weight", weight, "[C_out, C, 3, 3]", 4)
    if weight.shape[1:] != (embeddings.shape[2], 3, 3):
        raise ValueError(
            f"{op}: weight must be [C_out, {embeddings.shape[2]}, 3, 3], got {list(weight.shape)}; "
            "pass the weight of a 3x3 convolution of the embeddings' channels"
        )
    if bias is not None:
        check_tensor(op, "bias", bias, "[C_out]", 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: bias must be [{weight.shape[0]}] as the weight's outputs, got {list(bias.shape)}; "
                "pass the bias of the same convolution"
            )
    check_device(op, "boxes", boxes, "embeddings", embeddings)
    return box_paint_conv3x3_reference(
        embeddings, weight, bias, boxes, image_index, image_size, batch_size, level_sizes
    )
