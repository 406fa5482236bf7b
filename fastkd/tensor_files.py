"""Safetensors files whose bytes depend on their content alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensor_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, its metadata in alphabetical order: equal content, equal checksum.

    safetensors itself writes metadata in an order that differs from process to process.

    Args:
        path: overwritten; not atomic.
        tensors: contiguous, on the CPU, sharing no memory.
        metadata: of the file's header.
    """
    save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    if not metadata:
        return
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as long as before, but for the spaces that fill it up
            file.seek(8)
            file.write(text.ljust(length))
