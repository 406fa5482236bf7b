"""Checkpoints: folders of safetensors and JSON files with checksums, written atomically.

    checkpoints/step_0000600/model.safetensors  optimizer.safetensors  state.json  checksums.json

A folder is written under a temporary name, flushed to disk and renamed, so a crash leaves older checkpoints untouched.
Nothing is ever unpickled. A checkpoint with a wrong checksum is renamed to corrupt_step_* and the previous one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastkd.files import flush, replacing, write_json
from fastkd.tensor_files import save_tensor_file

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step_(\d{7,})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or none is usable."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Args:
        step: finished optimiser steps.
        model: state dict of the StepModule.
        optimizer: tensors of all optimisers.
        state: everything else, JSON types.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no memory, as safetensors requires."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically."""
    with replacing(path) as temporary:
        save_tensor_file(temporary, _plain(tensors), metadata)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes a checkpoint and removes all but the last `keep_last`.

    Raises: FloatingPointError for weights that are not finite, since a resumed run would fail at once.
    """
    broken = [name for name, t in checkpoint.model.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise FloatingPointError(
            f"train: weights must be finite to be saved, got NaN or infinity in {broken[:5]} after step "
            f"{checkpoint.step}; lower the learning rate or clip gradients; earlier checkpoints are kept"
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    temporary = folder / f".part_step_{checkpoint.step:07d}"
    try:
        _write_files(temporary, checkpoint)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its space is needed
        raise
    final = folder / f"step_{checkpoint.step:07d}"
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    flush(folder)
    prune(folder, keep_last)
    return final


def remove_stale(folder: Path) -> None:
    """Deletes what a process that was killed while it saved has left."""
    for stale in folder.glob(".part_*"):
        shutil.rmtree(stale)


def prune(folder: Path, keep_last: int) -> None:
    """Deletes all checkpoints but the last `keep_last`."""
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Makes the folder of a checkpoint and writes its files, the checksums last."""
    folder.mkdir()
    save_tensors(folder / "model.safetensors", checkpoint.model)
    save_tensors(folder / "optimizer.safetensors", checkpoint.optimizer)
    write_json(folder / "state.json", {"step": checkpoint.step, **checkpoint.state}, allow_nan=True)
    write_json(folder / "checksums.json", {name: sha256_of(folder / name) for name in _FILES})


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder in order of step, not verified."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def verify(path: Path) -> None:
    """Raises CheckpointError, naming the fault, if a checkpoint is incomplete or damaged."""
    try:
        checksums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: checksums.json cannot be read ({error})") from error
    for name in _FILES:
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        try:
            found = sha256_of(path / name)
        except OSError as error:  # a bad sector of the disk
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from error
        if not isinstance(checksums, dict) or found != checksums.get(name):
            raise CheckpointError(f"{path}: {name} does not have the recorded SHA-256")


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint after verifying it."""
    verify(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    step = state.pop("step")
    return Checkpoint(step, load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint; None if there are no checkpoints.

    Newer, damaged checkpoints are renamed, with a warning that names the fault.

    Raises: CheckpointError if there are checkpoints and none is intact.
    """
    found = list_checkpoints(folder)
    faults = []
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault, bad in zip(faults, reversed(found)):
            aside = bad.with_name(f"corrupt_{bad.name}")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(bad, aside)
            warnings.warn(f"resume: {fault}; set aside as {aside.name}, going back to {path.name}", stacklevel=2)
        return path
    if faults:
        raise CheckpointError(
            "resume: no checkpoint is intact: " + "; ".join(faults) + "; delete the run directory to start again"
        )
    return None


def recover(folder: Path, keep_last: int) -> Path | None:
    """`latest_checkpoint`; then deletes what a process that was killed while it saved or pruned has left."""
    path = latest_checkpoint(folder)
    remove_stale(folder)
    prune(folder, keep_last)
    return path
