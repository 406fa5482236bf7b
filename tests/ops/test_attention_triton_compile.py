"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: resources of the binaries."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu.triton_report import SHARED_LIMIT, Case, Row, read_kernel  # noqa: E402

CARDS = [80, 90, 100]
CASES = [
    Case("forward", projected=False, count=32),
    Case("forward", projected=True),
    Case("forward", projected=True, last=False),
    Case("backward", projected=False, count=32),
    Case("backward", projected=True),
    Case("backward", projected=True, last=False),
    Case("backward merge", projected=True, dtype=torch.float32),
    Case("mass", projected=False, count=7),
    Case("mass", projected=True),
    Case("forward", projected=False, dtype=torch.float32, count=32),
    Case("forward", projected=True, dtype=torch.float32),
    Case("backward", projected=True, last=False, dtype=torch.float32),
    Case("backward", projected=True, dtype=torch.float64),
]
# Bytes that may be spilled. Triton 3.6 spills up to 16 in some kernels, and more in float64, which only checks of
# gradients use.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
SPILLS = {torch.float64: 20416 * OLD}
SMALL_CARDS = 99 * 1024  # bytes of shared memory of sm_86, sm_89 and sm_120, which get the configurations of sm_80
INSTRUCTIONS = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}


def check(row: Row) -> None:
    assert row.spilled <= SPILLS.get(row.case.dtype, 16 * OLD), row
    assert row.shared <= SHARED_LIMIT[row.card], row
    assert row.card != 80 or row.case.dtype == torch.float64 or row.shared <= SMALL_CARDS, row
    if row.case.dtype.itemsize == 2:
        assert row.tensor_core and row.tensor_core.keys() <= INSTRUCTIONS[row.card], row
    assert not row.case.last or row.access == 128, row


@pytest.mark.sampled
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_tensor_cores(case, card):
    check(read_kernel(case, card))


def test_the_limits_are_checked():
    good = Row(CASES[0], 80, 128, 0, 64 * 1024, {"HMMA": 8}, 128)
    check(good)
    for change in ({"spilled": 24}, {"shared": 100 * 1024}, {"tensor_core": {}}, {"access": 32}):
        with pytest.raises(AssertionError):
            check(Row(**{**vars(good), **change}))


def test_float32_products_follow_torchs_setting():
    before = torch.backends.cuda.matmul.fp32_precision
    ieee, tf32 = (
        read_kernel(Case("forward", True, dtype=torch.float32, precision=name), 80) for name in ("ieee", "tf32")
    )
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert tf32.tensor_core and not ieee.tensor_core
