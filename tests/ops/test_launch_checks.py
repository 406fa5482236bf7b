"""Errors of impossible launches: too large a grid, a card without code, an error of the CUDA runtime.

In the emulation, with the same code of csrc/common/device.h; that it receives the runtime's errors is tested only on a
GPU.
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


simt.DEFINITIONS.define(
    "planted_launch_shared(Tensor on, int dynamic_bytes, int? allowed=None, bool much_static=False) -> ()"
)
KIB = 1024


def launch_shared(*arguments, card="sm_86"):
    simt.run("planted_launch_shared", torch.zeros(1), *arguments, shared_bytes=simt.SHARED_LIMITS[card])


@pytest.mark.parametrize("card", simt.SHARED_LIMITS)
def test_static_and_dynamic_shared_memory_count_together(card):
    """`launch` asks for permission wherever the two may be more than 48 KB; the card refuses what it has not."""
    most = simt.SHARED_LIMITS[card] - 1280  # what kernels are told, shared_limit
    for dynamic in (4, 46 * KIB, 48 * KIB - 1280, 48 * KIB - 64, 48 * KIB - 63, 48 * KIB, 48 * KIB + 1, most):
        launch_shared(dynamic, card=card)
    with pytest.raises(RuntimeError, match=f"^launch: {most + 1} dynamic bytes, allowed are {most}"):
        launch_shared(most + 1, card=card)


def test_launches_that_a_card_would_refuse():
    launch_shared(48 * KIB - 64, 0)
    with pytest.raises(RuntimeError, match=r"^launch: .* 49153 bytes of shared memory, without permission 49152"):
        launch_shared(48 * KIB - 63, 0)
    launch_shared(60 * KIB, 60 * KIB)
    with pytest.raises(RuntimeError, match=r"^launch: 61441 dynamic bytes, allowed are 61440"):
        launch_shared(60 * KIB + 1, 60 * KIB)
    launch_shared(99 * KIB - 64, 99 * KIB - 64)
    with pytest.raises(RuntimeError, match=r"^launch: .* 101440 bytes of shared memory allowed, the card has 101376"):
        launch_shared(60 * KIB, 99 * KIB)
    with pytest.raises(RuntimeError, match=r"^launch: 101377 bytes of shared memory, the card has 101376"):
        launch_shared(99 * KIB + 1, 99 * KIB + 1)


def test_static_arrays_beside_dynamic_memory_fit_in_what_launches_reckon_with():
    with pytest.raises(RuntimeError, match=r"^launch: .* 1296 static bytes beside dynamic ones, not 1280"):
        launch_shared(KIB, None, True)


LEVELS = [torch.zeros(1, 2, 3, 3)] * 17
BOXES, INDEX = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
MANY_LEVELS = {
    "instance_norm_mse": (LEVELS, LEVELS, 1e-5),
    "masked_mse": (LEVELS, LEVELS, [torch.zeros(1, 3, 3, dtype=torch.bool)] * 17),
    "value_mimic": (LEVELS, LEVELS, LEVELS, 1e-5),
    "norm_relu_box_pool": (LEVELS, BOXES, INDEX, 9, 9, 1e-5),
    "box_pool": (LEVELS, BOXES, INDEX, [9, 9]),
    "box_paint": (torch.zeros(17, 1, 2), BOXES, INDEX, [9, 9], 1, [3, 3] * 17),
    "mask_pool": (LEVELS, torch.zeros(1, 9, 9, dtype=torch.bool), INDEX),
    "mask_paint": (torch.zeros(17, 1, 2), torch.zeros(1, 9, 9, dtype=torch.bool), INDEX, 1, [3, 3] * 17),
    "box_paint_conv3x3": (torch.zeros(17, 1, 9, 2), None, BOXES, INDEX, 9, 9, 1, [3, 3] * 17, torch.zeros(1)),
    "imitation_mask": (BOXES, INDEX, [BOXES] * 17, [8, 8] * 17, 1, [3, 3] * 17, 0.5),
}


@pytest.mark.parametrize("op", MANY_LEVELS)
def test_more_levels_than_a_launch_takes(op):
    """Their table is a kernel argument; no pyramid in use has more than seven."""
    with pytest.raises(RuntimeError, match=rf"{op}: .*\b16\b"):
        simt.run(op, *MANY_LEVELS[op])


simt.DEFINITIONS.define("planted_launch_grid(Tensor on, int x, int y, int z) -> int")


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)])
def test_more_blocks_than_a_gpu_takes(grid):
    said = f"a launch of {' x '.join(map(str, grid))} blocks is more than a GPU takes; pass fewer images or objects"
    with pytest.raises(RuntimeError, match=said):
        torch.ops.fastkd_simt.planted_launch_grid(torch.zeros(1), *grid)
    assert torch.ops.fastkd_simt.planted_launch_grid(torch.zeros(1), 3, 2, 4) == 24
