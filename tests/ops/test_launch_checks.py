"""What is said where a launch cannot be: too large a grid, a card without code, an error of the CUDA runtime.

Under the emulation, through the same lines of csrc/common/device.h; only a GPU shows that the runtime's answers reach
them.
"""

import pytest
import simt
import torch

PYRAMIDS = [[torch.randn(1, 2, 3, 4)] for _ in range(2)]


def call():
    return torch.ops.fastkd_simt.instance_norm_mse(*PYRAMIDS, 1e-5)


@pytest.fixture(autouse=True)
def no_failures_left():
    simt.module.configure()
    yield
    simt.module.configure()


@pytest.mark.parametrize(
    ("has_code", "reason", "said"),
    [
        (
            False,
            "no kernel image is available for execution on the device",
            r"fastkd: this GPU or its driver cannot run the compiled GPU kernels \(no kernel image is available .*"
            r"`fastkd info` names the cards .* TORCH_CUDA_ARCH_LIST.*update the driver.*use_backend\(.reference.\)",
        ),
        (True, "invalid argument", r"fastkd: a kernel's launch failed \(invalid argument\); .*CUDA_LAUNCH_BLOCKING=1"),
    ],
)
def test_a_launch_that_fails(has_code, reason, said):
    expected = call()
    simt.module.configure()
    simt.module.fail_launches(has_code, reason)
    with pytest.raises(RuntimeError, match=said):
        call()
    simt.module.configure()
    assert all(torch.equal(one, other) for one, other in zip(expected, call()))


def test_no_launch_no_failure():
    simt.module.fail_launches(True, "invalid argument")
    empty = [[torch.zeros(0, 2, 3, 4)]] * 2
    torch.ops.fastkd_simt.value_mimic(*empty, [torch.zeros(0, 1, 3, 4)], 1e-5)


simt.DEFINITIONS.define("planted_launch_grid(Tensor on, int x, int y, int z) -> int")


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)])
def test_more_blocks_than_a_gpu_takes(grid):
    said = f"a launch of {' x '.join(map(str, grid))} blocks is more than a GPU takes; pass fewer images or objects"
    with pytest.raises(RuntimeError, match=said):
        torch.ops.fastkd_simt.planted_launch_grid(torch.zeros(1), *grid)
    assert torch.ops.fastkd_simt.planted_launch_grid(torch.zeros(1), 3, 2, 4) == 24
