"""Which precision a device computes fastest in."""

from __future__ import annotations

from typing import Literal

import torch

BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86 and Arm, as torch.cpu names them


def fast_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 on a GPU and on CPUs with instructions for it, else float32.

    A CPU without such instructions converts every operand: a step of a small detector takes six times as long as in
    float32. Where torch cannot tell the instructions of a CPU, float32 is the answer.
    """
    if device.type != "cpu":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if any(capabilities.get(name) for name in BFLOAT16_UNITS) else "float32"
