"""The emulation of CUDA for tests: loads build/cmake/_simt.so, with the ops of the .cu sources as functions.

FASTKD_SIMT selects another build, as `make sanitize` does with AddressSanitizer.

Tests that import this module are skipped if `make cmake` found no Python.h to build the emulation.
"""

import importlib.util
import os
import sysconfig
from pathlib import Path

import pytest
import torch

from fastkd.ops._support import library

TESTS = Path(__file__).resolve().parent
PATH = Path(os.environ.get("FASTKD_SIMT") or TESTS.parent / "build" / "cmake" / "_simt.so")
SEEDS = (0, 1, 2)
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}  # bytes of shared memory of a block


def load():
    """The module _simt; its ops are then torch.ops.fastkd_simt.*, with the schemas of torch.ops.fastkd.*."""
    assert library.why_not_loaded() is None, "the CPU library has the schemas"
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("fastkd::"):
            definition = str(schema).removeprefix("fastkd::")
            DEFINITIONS.define(definition)
    spec = importlib.util.spec_from_file_location("_simt", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not PATH.exists() and not (Path(sysconfig.get_path("include")) / "Python.h").exists():
    pytest.skip("no Python.h: the emulation of CUDA is not built", allow_module_level=True)
DEFINITIONS = torch.library.Library("fastkd_simt", "FRAGMENT")
module = load()


def run(name, *arguments, seed=0, poison=0xFF, shared_bytes=99 * 1024):
    """Call an op in the emulation; findings raise RuntimeError."""
    module.configure(seed, poison, shared_bytes)
    try:
        return getattr(torch.ops.fastkd_simt, name)(*arguments)
    finally:
        module.forget()
