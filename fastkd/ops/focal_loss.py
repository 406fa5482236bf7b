"""focal_loss: the sigmoid focal loss of dense detectors, without a tensor of one-hot targets.

Not a distillation op but the detectors' loss, which a step with LGD computes twice. Plain torch on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastkd.ops._support.checks import check_kernel_dtype, check_tensor
from fastkd.ops._support.coverage import widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import register_with_backward

_DISPATCH = Dispatch("focal_loss")


class _Focal(torch.autograd.Function):
    """Sums over negative entries, 0.75 p^2 softplus(x), and over positive ones, 0.25 (1 - p)^2 softplus(-x).

    Only the derivative, for negatives 1.5 p^2 ((1 - p) softplus(x) + p / 2), is saved, as the op is bound by passes
    over the logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, weight: Tensor, image: Tensor, anchor: Tensor, label: Tensor) -> Tensor:
        entries = (..., image, anchor, label)
        positive = logits[entries]  # [R, P]
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        each = zip(logits, logits if slope is None else slope, strict=True)
        rows = [_negatives(own, entries, None if slope is None else its) for own, its in each]
        total = (torch.stack(rows) * weight).flatten(-2).sum(-1) if rows else logits.new_empty(0)
        other, cost = (-positive).sigmoid(), F.softplus(-positive)  # 1 - p
        if slope is not None:
            # derivative of 0.25 (1 - p)^2 softplus(-x): -0.25 (1 - p)^2 (2 p softplus(-x) + 1 - p), divided by 1.5
            slope[entries] = other.square() * (2 * (other - 1) * cost - other) / 6
            ctx.save_for_backward(slope, weight)
        return 0.75 * total + 0.25 * (other.square() * cost * weight[image, anchor]).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        slope, weight = ctx.saved_tensors
        return slope * (1.5 * grad[..., None, None] * weight)[..., None], None, None, None, None


def _negatives(logits: Tensor, positives: tuple, slope: Tensor | None) -> Tensor:
    """p^2 softplus(x) of one pyramid's negatives, summed over classes; writes half its derivative into slope."""
    p, softplus = logits.sigmoid(), F.softplus(logits)
    if slope is not None:
        torch.lerp(softplus, p.new_full((), 0.5), p, out=slope)
    squared = p.square_()
    if slope is not None:
        slope.mul_(squared)
    squared.mul_(softplus)[positives] = 0
    return squared.sum(-1)


def focal_loss_reference(logits: Tensor, weight: Tensor, image: Tensor, anchor: Tensor, label: Tensor) -> Tensor:
    """Plain torch of `focal_loss` with an explicit gradient; no double backward."""
    wide = widen(logits).reshape(math.prod(logits.shape[:-3]), *logits.shape[-3:])
    return _Focal.apply(wide, weight.to(wide.dtype), image, anchor, label).reshape(logits.shape[:-3])


def focal_loss(logits: Tensor, weight: Tensor, image: Tensor, anchor: Tensor, label: Tensor) -> Tensor:
    """Weighted sum of the sigmoid focal loss (alpha 0.25, gamma 2) of all anchors and classes.

    Args:
        logits: [..., B, A, C] floating point; leading dimensions are pyramids with the same targets; receive a
            gradient (no double backward).
        weight: [B, A] of each anchor's entries; 0 leaves the anchor out. No gradient.
        image, anchor, label: [P] int64, the positive entries, without duplicates.
    Returns: [...], one sum per pyramid, float32 (float64 for float64 logits).
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree, or, on a CPU, a positive entry is out of
        range; RuntimeError on double backward.
    Source: Focal Loss for Dense Object Detection (Lin et al., 2017), as torchvision's sigmoid_focal_loss.
    """
    _check(logits, weight, {"image": image, "anchor": anchor, "label": label})
    if logits.device.type != "cpu" or not _DISPATCH.compiled(logits):
        return focal_loss_reference(logits, weight, image, anchor, label)
    weight = weight.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    flat = logits.reshape(math.prod(logits.shape[:-3]), *logits.shape[-3:])
    try:
        return torch.ops.fastkd.focal_loss(flat, weight, image, anchor, label).reshape(logits.shape[:-3])
    except RuntimeError as error:  # the kernel checks the entries
        _, found, message = str(error).partition("focal_loss: image, anchor and label must be in range")
        if not found:
            raise
        raise ValueError(found + message.splitlines()[0]) from None


def _check(logits: Tensor, weight: Tensor, entries: dict[str, Tensor]) -> None:
    op = "focal_loss"
    if not isinstance(logits, Tensor) or logits.dim() < 3:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{op}: logits must be a tensor [..., B, A, C], got {got}; pass all anchors' class scores")
    check_tensor(op, "logits", logits, "[..., B, A, C]", logits.dim())
    check_kernel_dtype(op, "logits", logits)
    check_tensor(op, "weight", weight, "[B, A]", 2)
    if weight.shape != logits.shape[-3:-1]:
        raise ValueError(
            f"{op}: weight must be [B, A] = {list(logits.shape[-3:-1])}, got {list(weight.shape)}; "
            "pass one number for each anchor of each image"
        )
    for name, value in entries.items():
        check_tensor(op, name, value, "[P]", 1, floating=False)
        if value.dtype != torch.int64 or value.shape != entries["image"].shape:
            raise ValueError(
                f"{op}: {name} must be int64 {list(entries['image'].shape)}, got {value.dtype} {list(value.shape)}; "
                "pass one number for each positive entry"
            )
    for name, value in {"weight": weight, **entries}.items():
        if value.device != logits.device:
            raise ValueError(f"{op}: {name} must be on {logits.device} as logits, got {value.device}; move it there")


def _forward_fake(logits, weight, image, anchor, label) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=weight.dtype)


def _backward_fake(grad, logits, weight, image, anchor, label) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return torch.ops.fastkd.focal_loss_backward(grad, *ctx.saved_tensors), None, None, None, None


if _DISPATCH.registered:
    register_with_backward(
        "focal_loss",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
