"""Argument checks shared by the public ops: every message reads "op: argument must be X, got Y; remedy".

They check types, shapes, dtypes and devices, which needs no synchronisation. Values are checked
(`check_object_values`) only for tensors on the CPU outside of tracing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: object, shape: str, dims: int, *, floating: bool = True) -> Tensor:
    """Return value; raise unless it is a tensor of `dims` dimensions (named in `shape`), floating point by default."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(value).__name__}; convert it first")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {value.layout}; call .to_dense()")
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} must be {shape}, got {list(value.shape)}; it needs {dims} dimensions")
    if floating and not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}; call .float()")
    return value


def check_kernel_dtype(op: str, name: str, value: Tensor) -> None:
    """Raise unless the compiled kernels support the dtype of value."""
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}; call .float()"
        )


def check_batch_size(op: str, batch_size: object) -> None:
    """Raise unless batch_size is a non-negative int."""
    if not isinstance(batch_size, int) or batch_size < 0:
        raise ValueError(f"{op}: batch_size must be an int >= 0, got {batch_size!r}; pass the number of images")


def check_levels(op: str, name: str, levels: object, *, channels: int | None = None) -> None:
    """Raise unless levels is a pyramid: a non-empty list of [B, C, H_l, W_l] that agree in B, C, dtype and device."""
    if not isinstance(levels, (list, tuple)):
        raise TypeError(
            f"{op}: {name} must be a list of [B, C, H_l, W_l] tensors, got {type(levels).__name__}; "
            "pass the levels as a list"
        )
    if not levels:
        raise ValueError(f"{op}: {name} must hold at least one level, got none; pass the levels as a list")
    for index, level in enumerate(levels):
        check_tensor(op, f"{name}[{index}]", level, "[B, C, H_l, W_l]", 4)
        first = levels[0]
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{op}: {name}[{index}] must be {list(first.shape[:2])} in B and C as the first level, "
                f"got {list(level.shape[:2])}; all levels need the same images and channels"
            )
        if level.dtype != first.dtype or level.device != first.device:
            raise ValueError(
                f"{op}: {name}[{index}] must be {first.dtype} on {first.device} as the first level, "
                f"got {level.dtype} on {level.device}; convert the levels alike"
            )
    if channels is not None and levels[0].shape[1] != channels:
        raise ValueError(
            f"{op}: {name} must have {channels} channels, got {levels[0].shape[1]}; "
            "build the module for the channels of this pyramid"
        )


def check_same_sizes(op: str, name: str, levels: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    """Raise unless two pyramids agree in batch size and level sizes (channels may differ)."""
    mine, theirs = ([(level.shape[0], *level.shape[2:]) for level in pyramid] for pyramid in (levels, others))
    if mine != theirs:
        raise ValueError(
            f"{op}: {name} must have the images and cells of {other} (B, H_l, W_l): {theirs}, got {mine}; "
            "both pyramids need the same strides on the same padded images"
        )


def check_index(op: str, name: str, rows: Tensor, image_index: object) -> None:
    """Raise unless image_index is [K] int64 on the device of the K rows, called `name` in the message."""
    image_index = check_tensor(op, "image_index", image_index, "[K]", 1, floating=False)
    if image_index.dtype != torch.int64:
        raise TypeError(f"{op}: image_index must be int64, got {image_index.dtype}; call .long()")
    if image_index.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{op}: image_index must have one entry for each of the {rows.shape[0]} {name}, "
            f"got {image_index.shape[0]}; pass the image of every object"
        )
    if image_index.device != rows.device:
        raise ValueError(
            f"{op}: image_index must be on {rows.device} as the {name}, got {image_index.device}; "
            "move them to one device"
        )


def check_boxes(op: str, boxes: object, image_index: object) -> None:
    """Raise unless boxes is [K, 4] floating point and image_index [K] int64 on the same device."""
    boxes = check_tensor(op, "boxes", boxes, "[K, 4]", 2)
    if boxes.shape[1] != 4:
        raise ValueError(
            f"{op}: boxes must be [K, 4], got {list(boxes.shape)}; pass xyxy boxes of all images concatenated"
        )
    check_index(op, "boxes", boxes, image_index)


def values_at_hand(value: Tensor) -> bool:
    """Whether value is on the CPU and its values can be read: no tracing, no fake or transformed tensor."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def check_object_values(op: str, image_index: Tensor, batch_size: int, boxes: Tensor | None = None) -> None:
    """Raise ValueError unless image_index lies in [0, batch_size) and boxes, if given, are finite.

    Not checked on other devices than the CPU and under torch.compile: kernels are memory-safe for any value.
    """
    if image_index.numel() and values_at_hand(image_index):
        low, high = (_number(extreme) for extreme in image_index.detach().aminmax())
        if low < 0 or high >= batch_size:
            raise ValueError(
                f"{op}: image_index must be in [0, {batch_size}), got {low if low < 0 else high}; "
                "pass the image of every object"
            )
    if boxes is not None and boxes.numel() and values_at_hand(boxes) and not _finite(boxes):
        raise ValueError(f"{op}: boxes must be finite, got NaN or infinity; leave such boxes out")


def _number(scalar: Tensor) -> Any:
    """The value of a scalar CPU tensor; unlike `item`, dispatches no operator."""
    return scalar.tolist()


def _finite(values: Tensor) -> bool:
    """Whether all values are finite, in one pass: aminmax propagates NaN."""
    values = values.detach()
    if values.itemsize == 1:  # aminmax does not support float8
        values = values.float()
    return all(math.isfinite(_number(extreme)) for extreme in values.aminmax())


def check_masks(op: str, masks: object, image_index: object) -> None:
    """Raise unless masks is [K, H, W] bool and image_index [K] int64 on the same device."""
    masks = check_tensor(op, "masks", masks, "[K, H, W]", 3, floating=False)
    if masks.dtype != torch.bool:
        raise TypeError(f"{op}: masks must be bool, got {masks.dtype}; compare with a threshold first")
    if 0 in masks.shape[1:]:
        raise ValueError(f"{op}: masks must have pixels, got {list(masks.shape)}; pass masks over the padded batch")
    check_index(op, "masks", masks, image_index)


def check_size(op: str, name: str, size: object) -> None:
    """Raise unless size is a pair (height, width) of positive ints."""
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {size!r}; pass two ints")
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"{op}: {name} must be two positive ints, got {tuple(size)!r}; pass (height, width)")


def check_embeddings(op: str, embeddings: object, objects: int, level_sizes: Sequence[tuple[int, int]]) -> None:
    """Raise unless embeddings is [L, K, C] for the K objects and the L level sizes."""
    embeddings = check_tensor(op, "embeddings", embeddings, "[L, K, C]", 3)
    if not isinstance(level_sizes, (list, tuple)):
        raise TypeError(
            f"{op}: level_sizes must be a list of (H_l, W_l), got {type(level_sizes).__name__}; "
            "pass a pair for each level"
        )
    for size in level_sizes:
        check_size(op, "level_sizes", size)
        if max(size) >= 2**30:
            raise ValueError(f"{op}: level_sizes must be below 2^30, got {tuple(size)}; pass (H_l, W_l) in cells")
    if embeddings.shape[0] != len(level_sizes) or embeddings.shape[1] != objects:
        raise ValueError(
            f"{op}: embeddings must be [{len(level_sizes)}, {objects}, C] for {len(level_sizes)} levels and "
            f"{objects} objects, got {list(embeddings.shape)}; pass one row for each level and object"
        )


def check_device(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Raise unless value is on the device of reference."""
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {name} must be on {reference.device} as {other}, got {value.device}; move them to one device"
        )
