"""attention_mass: attention of the chosen queries to each cell, summed (ICD, methods 1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_tensor
from fastkd.ops._support.coverage import full_precision, widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import register
from fastkd.ops.instance_attention import (
    attention_logits_reference,
    check_attention,
    check_dtype_and_device,
    kernel_arguments,
)

_DISPATCH = Dispatch("attention_mass")


@torch.no_grad()
def attention_mass_reference(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
    chosen: Tensor,
    logsumexp: Tensor | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Plain torch of `attention_mass`."""
    with full_precision(queries):
        logits = attention_logits_reference(queries, levels, key_weight, row_bias, column_bias) / temperature
        if logsumexp is None:
            logsumexp = logits.logsumexp(dim=3)
        probability = (logits - widen(logsumexp)[..., None]).exp()  # [B, G, N, S]
        mass = torch.where(chosen[:, None, :, None], probability, 0.0).sum(dim=2)  # [B, G, S]
        parts = mass.split([level.shape[2] * level.shape[3] for level in levels], dim=2)
        return [part.unflatten(2, tuple(level.shape[2:])) for part, level in zip(parts, levels, strict=True)]


@torch.no_grad()
def attention_mass(
    queries: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    row_bias: Sequence[Tensor] | None,
    column_bias: Sequence[Tensor] | None,
    chosen: Tensor,
    logsumexp: Tensor | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Sum over the chosen queries of their attention probabilities, per head and cell.

    M[l][b, g, y, x] = sum over n with chosen[b, n] of softmax over s of (logits[b, g, n] / temperature); logits as in
    `instance_attention`.

    Args:
        queries, levels, key_weight, row_bias, column_bias: as for `instance_attention`, tables or None; none
            receives a gradient.
        chosen: [B, N] bool.
        logsumexp: [B, G, N] that `instance_attention` returned for the same arguments, or None to compute it;
            must be None unless temperature is 1.
        temperature: > 0.
    Returns: L tensors [B, G, H_l, W_l], float32 (float64 for float64).
    Raises: ValueError or TypeError if shapes or dtypes disagree.
    Source: ICD (Kang et al., NeurIPS 2021), section 3.3.
    """
    op = "attention_mass"
    row_bias, column_bias = check_attention(op, queries, levels, key_weight, row_bias, column_bias)
    check_tensor(op, "chosen", chosen, "[B, N]", 2, floating=False)
    batch, heads, count, _ = queries.shape
    if chosen.layout != torch.strided:
        raise ValueError(f"{op}: chosen must be a dense tensor, got {chosen.layout}; call .to_dense()")
    if chosen.dtype != torch.bool:
        raise TypeError(f"{op}: chosen must be bool, got {chosen.dtype}; call .bool()")
    if tuple(chosen.shape) != (batch, count):
        raise ValueError(f"{op}: chosen must be [{batch}, {count}], got {list(chosen.shape)}; one flag for each query")
    check_device(op, "chosen", chosen, "the queries", queries)
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be > 0 and finite, got {temperature!r}; 1 is the published value")
    if logsumexp is not None:
        check_tensor(op, "logsumexp", logsumexp, "[B, G, N]", 3)
        check_dtype_and_device(op, "logsumexp", logsumexp, queries)
        if tuple(logsumexp.shape) != (batch, heads, count):
            raise ValueError(
                f"{op}: logsumexp must be [{batch}, {heads}, {count}], got {list(logsumexp.shape)}; "
                "pass what instance_attention returned for these queries"
            )
        if temperature != 1:
            raise ValueError(
                f"{op}: logsumexp must be None at temperature {temperature}, got a tensor; "
                "instance_attention's is that of temperature 1"
            )
    if not _DISPATCH.compiled(queries):
        return attention_mass_reference(
            queries, levels, key_weight, row_bias, column_bias, chosen, logsumexp, temperature
        )
    arguments = kernel_arguments(queries, levels, key_weight, row_bias, column_bias)
    logsumexp = None if logsumexp is None else widen(logsumexp)
    return torch.ops.fastkd.attention_mass(*arguments, chosen, logsumexp, float(temperature))


def _fake(queries, levels, key_weight, row_bias, column_bias, chosen, logsumexp, temperature) -> list[Tensor]:
    return [queries.new_empty((*queries.shape[:2], *level.shape[2:])) for level in levels]


if _DISPATCH.registered:
    register("attention_mass", fake=_fake)
