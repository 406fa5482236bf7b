"""Writes safetensors files deterministically: equal content gives equal bytes."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensor_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with sorted metadata, so that equal content gives an equal checksum.

    The order in which safetensors writes metadata differs from process to process.

    Args:
        path: overwritten; not atomic.
        tensors: contiguous, on the CPU, sharing no memory.
        metadata: entries of the file header's "__metadata__".
    Raises: OSError that names the file if it cannot be written.
    """
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors gives the system's error as text
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    if not metadata:
        return
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # padded with spaces to the same length
            file.seek(8)
            file.write(text.ljust(length))
