"""The kernel against torch's attention; `fastkd` is loaded by the fixture, from the folder above."""

from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels", reason="Hugging Face's kernels are not installed")


@pytest.fixture(scope="module")
def fastkd():
    return kernels.get_local_kernel(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cross_attention_over_a_pyramid(fastkd, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    sizes = [(8, 10), (4, 5)]
    queries = torch.randn(2, 4, 6, 16, device=device, requires_grad=True)
    weight = torch.randn(64, 32, device=device) / 32**0.5
    levels, values = ([torch.randn(2, c, *size, device=device) for size in sizes] for c in (32, 64))
    keys = weight @ torch.cat([level.flatten(2) for level in levels], 2)
    value = torch.cat([level.flatten(2) for level in values], 2)
    heads = [one.unflatten(1, (4, 16)).transpose(2, 3) for one in (keys, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *heads, scale=1.0)
    output, logsumexp = fastkd.instance_attention(queries, levels, weight, None, None, values)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(one.square().sum(), queries)[0] for one in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    chosen = torch.ones(2, 6, dtype=torch.bool, device=device)
    mass = fastkd.attention_mass(queries, levels, weight, None, None, chosen, logsumexp)
    assert sum(float(level.sum()) for level in mass) == pytest.approx(2 * 4 * 6, rel=1e-4)
