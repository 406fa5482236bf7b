"""The one tolerance rule of all ops and dtypes (never loosened)."""

import math

import torch
from torch import Tensor


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    if value == 0:
        return info.smallest_normal * info.eps
    return info.eps * 2.0 ** max(math.floor(math.log2(abs(value))), math.log2(info.smallest_normal))


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_no_worse(actual, plain, exact) -> None:
    """Asserts that `actual` is as good as plain torch.

    error against float64 <= 2 * plain torch's error + 1 ulp of the largest value

    Args:
        actual: result under test, a tensor or a (nested) sequence of tensors.
        plain: plain torch's result from the same arguments; shapes and dtypes of `actual` must be these.
        exact: plain torch's result from the same values in float64.
    Raises: AssertionError where a shape, a dtype or a non-finite value differs or the error is larger.
    """
    if not isinstance(plain, Tensor):
        assert len(actual) == len(plain) == len(exact), f"{len(actual)} results, plain torch gives {len(plain)}"
        for one in zip(actual, plain, exact):
            assert_no_worse(*one)
        return
    assert actual.shape == plain.shape, f"shape {tuple(actual.shape)}, plain torch gives {tuple(plain.shape)}"
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, plain torch gives {plain.dtype}"
    assert exact.dtype == torch.float64, f"the exact result must be float64, got {exact.dtype}"
    actual, plain, exact, dtype = actual.detach().double(), plain.detach().double(), exact.detach(), actual.dtype
    finite = exact.isfinite()
    for other in (actual, plain):
        assert torch.equal(other.isfinite(), finite), "values are finite where they should not be, or the reverse"
        assert torch.equal(other.isnan(), exact.isnan()), "NaN and infinity differ"
    if not finite.any():
        return
    error, plain_error = largest((actual - exact)[finite]), largest((plain - exact)[finite])
    allowed = 2 * plain_error + ulp(largest(exact[finite]), dtype)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (plain torch {plain_error:.3e}, {dtype})"
