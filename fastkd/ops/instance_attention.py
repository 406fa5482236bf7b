"""instance_attention: attention of a few queries to all cells of a pyramid (ICD's decoder, methods 1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_levels, check_same_sizes, check_tensor
from fastkd.ops._support.coverage import flatten_pyramid, full_precision, widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import dense_like, register_with_backward

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DISPATCH = Dispatch("instance_attention")


FEW_ON_GPU = 32  # queries in one block of the GPU kernels


def absorbing_is_cheaper(queries: Tensor, channels: int) -> bool:
    """Whether (W_k^T q) . x takes fewer multiplications than q . (W_k x); on a GPU False beyond a block of queries."""
    heads, count, depth = queries.shape[1:]
    if queries.is_cuda and count > FEW_ON_GPU:
        return False
    return heads * count * channels < heads * depth * (channels + count)


def attention_logits_reference(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
) -> Tensor:
    """Logits [B, G, N, S] of `instance_attention`: q . (W_k x) + row bias + column bias, levels concatenated.

    q . (W_k x) = (W_k^T q) . x: the projection is applied to the queries if that takes fewer multiplications.
    """
    heads, count, depth = queries.shape[1:]
    cells = flatten_pyramid([level.detach() for level in levels])  # [B, C, S]
    channels = cells.shape[1]
    weight = widen(key_weight).unflatten(0, (heads, depth))  # [G, d, C]
    if absorbing_is_cheaper(queries, channels):
        absorbed = torch.einsum("bgnd,gdc->bgnc", widen(queries), weight)
        logits = (absorbed.flatten(1, 2) @ cells).unflatten(1, (heads, count))
    else:
        keys = weight.flatten(0, 1).expand(len(cells), -1, -1) @ cells
        keys = keys.unflatten(1, (heads, depth))  # [B, G, d, S]
        logits = widen(queries) @ keys
    row_bias, column_bias = bias_tables(queries, levels, row_bias, column_bias)
    bias = [
        (widen(row)[..., :, None] + widen(column)[..., None, :]).flatten(3)
        for row, column in zip(row_bias, column_bias, strict=True)
    ]
    return logits + torch.cat(bias, dim=3)


def bias_tables(
    queries: Tensor,
    levels: Sequence[Tensor],
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The bias tables; None becomes zeros [B, G, N, H_l or W_l]."""

    def zeros(axis: int) -> list[Tensor]:
        return [widen(queries).new_zeros((*queries.shape[:3], level.shape[axis])) for level in levels]

    return zeros(2) if row_bias is None else row_bias, zeros(3) if column_bias is None else column_bias


def instance_attention_reference(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Plain torch of `instance_attention`."""
    with full_precision(queries):
        logits = attention_logits_reference(queries, levels, key_weight, row_bias, column_bias)
        value = flatten_pyramid(values).unflatten(1, (queries.shape[1], -1))  # [B, G, d_v, S]
        output = logits.softmax(dim=3) @ value.transpose(2, 3)
        return output.to(queries.dtype), logits.detach().logsumexp(dim=3)


def check_attention(
    op: str,
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The bias tables, zeros for None; raise unless queries, pyramid, key projection and tables are consistent."""
    check_tensor(op, "queries", queries, "[B, G, N, d]", 4)
    check_levels(op, "levels", levels)
    row_bias, column_bias = bias_tables(queries, levels, row_bias, column_bias)
    check_tensor(op, "key_weight", key_weight, "[G * d, C]", 2)
    batch, heads, count, depth = queries.shape
    if heads < 1:
        raise ValueError(f"{op}: queries must have at least one head, got {list(queries.shape)}; pass [B, G, N, d]")
    if levels[0].shape[0] != batch:
        raise ValueError(
            f"{op}: levels must hold the {batch} images of the queries, got {levels[0].shape[0]}; "
            "pass queries and pyramid of the same images"
        )
    if tuple(key_weight.shape) != (heads * depth, levels[0].shape[1]):
        raise ValueError(
            f"{op}: key_weight must be [{heads * depth}, {levels[0].shape[1]}], got {list(key_weight.shape)}; "
            "it projects the levels' channels to all heads"
        )
    for name, tables, axis in (("row_bias", row_bias, 2), ("column_bias", column_bias, 3)):
        if not isinstance(tables, (list, tuple)):
            raise TypeError(
                f"{op}: {name} must be a list of [B, G, N, side] tensors, got {type(tables).__name__}; "
                "pass one for each level"
            )
        if len(tables) != len(levels):
            raise ValueError(f"{op}: {name} must hold {len(levels)} tables, got {len(tables)}; pass one for each level")
        for index, (table, level) in enumerate(zip(tables, levels, strict=True)):
            check_tensor(op, f"{name}[{index}]", table, "[B, G, N, side]", 4)
            expected = (batch, heads, count, level.shape[axis])
            if tuple(table.shape) != expected:
                raise ValueError(
                    f"{op}: {name}[{index}] must be {list(expected)}, got {list(table.shape)}; "
                    "it holds one number for each query and each row or column of the level"
                )
    for name, value in (("queries", queries), ("key_weight", key_weight)):
        check_dtype_and_device(op, name, value, queries)
    for name, values in (("levels", levels), ("row_bias", row_bias), ("column_bias", column_bias)):
        for index, value in enumerate(values):
            check_dtype_and_device(op, f"{name}[{index}]", value, queries)
    return row_bias, column_bias


def check_dtype_and_device(op: str, name: str, value: Tensor, queries: Tensor) -> None:
    """Raise unless value is dense, on the queries' device, of a supported dtype; float64 only if the queries are."""
    check_device(op, name, value, "the queries", queries)
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {value.layout}; call .to_dense()")
    if value.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}; convert it")
    if (value.dtype == torch.float64) != (queries.dtype == torch.float64):
        raise ValueError(
            f"{op}: {name} must be float64 if and only if the queries ({queries.dtype}) are, got {value.dtype}; "
            "convert one of them"
        )


def instance_attention(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Multi-head attention of N queries over all cells of all levels.

    logits[b, g, n, s] = queries[b, g, n] . (W_k x_s)_g + row_bias[l][b, g, n, y] + column_bias[l][b, g, n, x] with
    s = (l, y, x); output = softmax over s of the logits, times the values. A bias of -inf masks a row or a column;
    at least one cell must remain.

    Args:
        queries: [B, G, N, d], floating point, already scaled by 1 / sqrt(d); receives gradients.
        levels: L tensors [B, C, H_l, W_l], the input of the key projection; frozen, receive no gradient.
        key_weight: [G * d, C], heads concatenated; receives gradients.
        row_bias: L tensors [B, G, N, H_l]; receive gradients. None: no bias, plain cross-attention.
        column_bias: L tensors [B, G, N, W_l]; likewise.
        values: L tensors [B, G * d_v, H_l, W_l], heads concatenated; receive gradients.
    Returns: output [B, G, N, d_v], dtype of queries, and logsumexp of the logits [B, G, N], float32 (float64 for
        float64), without gradient.
    Raises: ValueError or TypeError if shapes or dtypes disagree.
    Source: ICD (Kang et al., NeurIPS 2021), section 3.2.
    """
    row_bias, column_bias = check_attention("instance_attention", queries, levels, key_weight, row_bias, column_bias)
    check_levels("instance_attention", "values", values)
    check_same_sizes("instance_attention", "values", values, "levels", levels)
    if values[0].shape[1] % queries.shape[1]:
        raise ValueError(
            f"instance_attention: values must have a multiple of {queries.shape[1]} channels (heads), "
            f"got {values[0].shape[1]}; project to heads * depth channels"
        )
    for index, value in enumerate(values):
        check_dtype_and_device("instance_attention", f"values[{index}]", value, queries)
    if not _DISPATCH.compiled(queries):
        return instance_attention_reference(queries, levels, key_weight, row_bias, column_bias, values)
    arguments = kernel_arguments(queries, levels, key_weight, row_bias, column_bias)
    output, logsumexp, _ = torch.ops.fastkd.instance_attention(*arguments, list(values))
    return output.to(queries.dtype), logsumexp


def kernel_arguments(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor],
    column_bias: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    """Arguments of the kernels: small tensors as float32 or wider, the key projection applied to few queries."""
    wide, weight = widen(queries), widen(key_weight)
    rows, columns = ([widen(table) for table in side] for side in (row_bias, column_bias))
    cells = [level.detach() for level in levels]
    if absorbing_is_cheaper(queries, levels[0].shape[1]):
        with full_precision(queries):
            heads = weight.unflatten(0, (queries.shape[1], -1))
            return torch.einsum("bgnd,gdc->bgnc", wide, heads), cells, None, rows, columns
    return wide, cells, weight, rows, columns


def _forward_fake(queries, levels, key_weight, row_bias, column_bias, values) -> tuple[Tensor, Tensor, Tensor]:
    rows = queries.shape[:3]
    output = queries.new_empty((*rows, values[0].shape[1] // rows[1]))
    return output, queries.new_empty(rows), queries.new_empty((*rows, 2))


def _backward_fake(
    grad, output, normal, queries, levels, key_weight, row_bias, column_bias, values, for_keys, for_values
) -> list[Tensor]:
    small = [queries, *([] if key_weight is None else [key_weight]), *row_bias, *column_bias] if for_keys else []
    gradients = [value.new_empty(value.shape) for value in small]
    return gradients + [dense_like(value) for value in values if for_values]


def _setup_context(ctx, inputs, output) -> None:
    queries, levels, key_weight, row_bias, column_bias, values = inputs
    ctx.levels, ctx.projected = len(levels), key_weight is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    weight = [key_weight] if ctx.projected else []
    ctx.save_for_backward(output[0], output[2], queries, *weight, *levels, *row_bias, *column_bias, *values)


def _backward(ctx, grad_output: Tensor | None, grad_logsumexp: None, grad_normal: None):
    count = ctx.levels
    none = [None] * count
    if grad_output is None:
        return None, none, None, none, none, none
    output, normal, queries, *saved = ctx.saved_tensors
    weight = saved.pop(0) if ctx.projected else None
    levels, row_bias, column_bias, values = (saved[i * count : (i + 1) * count] for i in range(4))
    needs = ctx.needs_input_grad
    for_keys, for_values = needs[0] or needs[2] or any(needs[3]) or any(needs[4]), any(needs[5])
    gradients = torch.ops.fastkd.instance_attention_backward(
        grad_output, output, normal, queries, levels, weight, row_bias, column_bias, values, for_keys, for_values
    )
    grad_values = gradients[-count:] if for_values else none
    if not for_keys:
        return None, none, None, none, none, grad_values
    grad_queries = gradients.pop(0)
    grad_weight = gradients.pop(0) if ctx.projected else None
    return grad_queries, none, grad_weight, gradients[:count], gradients[count : 2 * count], grad_values


if _DISPATCH.registered:
    register_with_backward(
        "instance_attention",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
