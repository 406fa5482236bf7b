"""Triton's interpreter for kernel tests: programs in random order, bfloat16 as on GPUs."""

import random

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SEED = [0]  # of the programs' order


def shuffle_programs():
    """A launch's programs run in an order drawn from SEED."""
    set_dim, set_index, order = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx, []

    def shuffled_dim(self, x, y, z):
        order[:] = random.Random(SEED[0]).sample(range(x), x)
        set_dim(self, x, y, z)

    InterpreterBuilder.set_grid_dim = shuffled_dim
    InterpreterBuilder.set_grid_idx = lambda self, x, y, z: set_index(self, order[x], y, z)


def keep_bfloat16_as_gpus_do():
    """Fixes the interpreter, which stores bfloat16 as integers, multiplies those, and rounds towards 0."""
    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def nearest(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), target.scalar)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    InterpreterBuilder.cast_impl = nearest
