"""The emulation finds every planted bug, in every schedule, and nothing in the mended kernels."""

import pytest
import simt
import torch

PLANTED = simt.module.planted_bugs()


def test_there_are_planted_bugs_of_every_kind():
    kinds = {"bounds", "uninitialised", "race", "barrier", "lane", "overflow", "misaligned", "read-only"}
    assert set(PLANTED.values()) == kinds and len(PLANTED) >= 10


@pytest.mark.sampled
@pytest.mark.parametrize("seed", simt.SEEDS)
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_planted_bug(name, seed):
    simt.module.configure(seed, 0xFF)
    simt.module.run_planted(name, False)
    with pytest.raises(RuntimeError, match=f"^{PLANTED[name]}: "):
        simt.module.run_planted(name, True)


def test_memory_is_taken_for_what_the_tensor_holds():
    simt.DEFINITIONS.define("planted_taken_for_doubles(Tensor tensor) -> int")
    assert simt.run("planted_taken_for_doubles", torch.empty(6, dtype=torch.float64)) == 48
    with pytest.raises(RuntimeError, match="a kernel takes elements of 8 bytes, the tensor holds 4; pass tensors of"):
        simt.run("planted_taken_for_doubles", torch.empty(6))
