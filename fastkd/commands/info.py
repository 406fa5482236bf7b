"""`fastkd info`: versions, build and hardware."""

from __future__ import annotations


def info() -> None:
    """Show versions, the build, the CPU's capability, the GPU, and which kernels are compiled."""
    from fastkd.info import print_info

    print_info()
