"""box_paint_conv3x3: a 3x3 convolution of painted boxes (LGD, methods 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.ops._support.checks import (
    check_batch_size,
    check_boxes,
    check_device,
    check_embeddings,
    check_kernel_dtype,
    check_object_values,
    check_size,
    check_tensor,
)
from fastkd.ops._support.coverage import full_precision, widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import register_with_backward
from fastkd.ops.box_paint import box_paint_reference

_DISPATCH = Dispatch("box_paint_conv3x3")
_TAPS = Dispatch("conv3x3_taps")


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
        weight: [C_out, C, 3, 3], shared by the levels, of the same dtype; receives gradients.
        bias: [C_out], of the same dtype, or None; receives gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, batch_size).
        image_size: (H, W) of the padded batch, pixels.
        batch_size: B.
        level_sizes: L pairs (H_l, W_l).
    Returns: L tensors [B, C_out, H_l, W_l], channels-last; dtype of embeddings or, under autocast, autocast's dtype, as
        for a convolution. Under autocast embeddings, weight and bias may differ in dtype.
    Raises: ValueError or TypeError if shapes, dtypes, devices or values are wrong; RuntimeError on double
        backward of the compiled kernel.
    Source: LGD (Zhang et al., AAAI 2022), intra-object knowledge mapper.
    """
    _check(embeddings, weight, bias, boxes, image_index, image_size, batch_size, level_sizes)
    if not _DISPATCH.compiled(embeddings):
        return box_paint_conv3x3_reference(
            embeddings, weight, bias, boxes, image_index, image_size, batch_size, level_sizes
        )
    like = embeddings.new_empty(0, dtype=_result_dtype(embeddings))
    sides = [side for size in level_sizes for side in size]
    with full_precision(embeddings):
        taps = multiply_taps(embeddings, weight)
        bias = None if bias is None else widen(bias)
        levels = torch.ops.fastkd.box_paint_conv3x3(
            taps, bias, boxes.detach(), image_index, *image_size, batch_size, sides, like
        )
    return [level.permute(0, 3, 1, 2) for level in levels]


def multiply_taps(embeddings: Tensor, weight: Tensor) -> Tensor:
    """The nine products of every embedding [L, K, C] with the weight [C_out, C, 3, 3]: [L, K, 9, C_out], widened."""
    embeddings, weight = widen(embeddings), widen(weight)
    if embeddings.device.type == "cpu" and _TAPS.compiled(embeddings):
        taps = torch.ops.fastkd.conv3x3_taps(embeddings.flatten(0, 1), weight)
        return taps.unflatten(0, embeddings.shape[:2])
    return Taps.apply(embeddings, weight)


class Taps(torch.autograd.Function):
    """`multiply_taps` by torch's matrix product; does not save the weight matrix, a copy of weight, for backward."""

    @staticmethod
    def forward(embeddings: Tensor, weight: Tensor) -> Tensor:
        return (embeddings @ Taps.matrix(weight)).unflatten(2, (9, weight.shape[0]))

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:  # [C, 9 * C_out]
        return weight.permute(1, 2, 3, 0).reshape(weight.shape[1], 9 * weight.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        embeddings, weight = ctx.saved_tensors
        grad, for_embeddings, for_weight = grad.flatten(2), None, None
        if ctx.needs_input_grad[0]:
            for_embeddings = grad @ Taps.matrix(weight).t()
        if ctx.needs_input_grad[1]:
            matrix = embeddings.flatten(0, 1).t() @ grad.flatten(0, 1)  # [C, 9 * C_out]
            for_weight = matrix.reshape(weight.shape[1], 3, 3, weight.shape[0]).permute(3, 0, 1, 2)
        return for_embeddings, for_weight


def _result_dtype(embeddings: Tensor) -> torch.dtype:
    device = embeddings.device.type
    if torch.is_autocast_enabled(device) and embeddings.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return embeddings.dtype


def _check(embeddings, weight, bias, boxes, image_index, image_size, batch_size, level_sizes) -> None:
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
    check_batch_size(op, batch_size)
    _check_dtypes(op, embeddings, {"weight": weight, "bias": bias})
    check_object_values(op, image_index, batch_size, boxes)


def _check_dtypes(op: str, embeddings: Tensor, others: dict[str, Tensor | None]) -> None:
    check_kernel_dtype(op, "embeddings", embeddings)
    mixed = torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype != torch.float64
    allowed = (torch.float32, torch.bfloat16, torch.float16) if mixed else (embeddings.dtype,)
    for name, value in others.items():
        if value is None:
            continue
        check_device(op, name, value, "embeddings", embeddings)
        if value.dtype not in allowed:
            raise ValueError(
                f"{op}: {name} must be {embeddings.dtype} as embeddings, got {value.dtype}; "
                "convert one, or use autocast"
            )


def _forward_fake(taps, bias, boxes, image_index, height, width, batch_size, sizes, like) -> list[Tensor]:
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return [like.new_empty((batch_size, rows, columns, taps.shape[3])) for rows, columns in pairs]


def _backward_fake(grads, boxes, image_index, height, width) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    channels = grads[0].shape[3]
    taps = grads[0].new_empty((len(grads), boxes.shape[0], 9, channels), dtype=dtype)
    return taps, grads[0].new_empty((channels,), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, bias, boxes, image_index, ctx.height, ctx.width, _, _, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(boxes, image_index)


def _backward(ctx, grads: list[Tensor]):
    boxes, image_index = ctx.saved_tensors
    taps, bias = torch.ops.fastkd.box_paint_conv3x3_backward(grads, boxes, image_index, ctx.height, ctx.width)
    return taps, bias if ctx.has_bias else None, None, None, None, None, None, None, None


def _taps_fake(embeddings: Tensor, weight: Tensor) -> Tensor:
    return embeddings.new_empty((embeddings.shape[0], 9, weight.shape[0]))


def _taps_backward_fake(grad, embeddings, weight, for_embeddings, for_weight) -> tuple[Tensor, Tensor]:
    rows = embeddings.shape[0] if for_embeddings else 0
    return embeddings.new_empty((rows, embeddings.shape[1])), weight.new_empty(
        (weight.shape[0] if for_weight else 0, *weight.shape[1:])
    )


def _taps_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _taps_backward(ctx, grad: Tensor):
    wanted = tuple(ctx.needs_input_grad)
    gradients = torch.ops.fastkd.conv3x3_taps_backward(grad, *ctx.saved_tensors, *wanted)
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


if _DISPATCH.registered:
    register_with_backward(
        "box_paint_conv3x3",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )

if _TAPS.registered:
    register_with_backward(
        "conv3x3_taps",
        fake=_taps_fake,
        setup_context=_taps_setup_context,
        backward=_taps_backward,
        backward_fake=_taps_backward_fake,
        public="box_paint_conv3x3",
    )
