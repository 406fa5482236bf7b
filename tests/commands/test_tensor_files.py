"""Tensor files: the same content gives the same bytes, in any process."""

import subprocess
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastkd.tensor_files import save_tensor_file

METADATA = {f"key {number}": f'"value"\n{number} é' for number in range(12)}


def test_metadata_and_tensors_survive(tmp_path):
    tensors = {"a": torch.arange(7, dtype=torch.float16), "b.c": torch.zeros(2, 0), "d": torch.tensor(3)}
    path = tmp_path / "x.safetensors"
    save_tensor_file(path, tensors, METADATA)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_equal_content_gives_equal_bytes(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from fastkd.tensor_files import save_tensor_file;"
        f"save_tensor_file(Path(sys.argv[1]), {{'a': torch.ones(3)}}, {METADATA!r})"
    )
    path = tmp_path / "other.safetensors"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)  # with other hashes of its strings
    contents = {path.read_bytes()}
    for number in range(4):
        save_tensor_file(path, {"a": torch.ones(3)}, dict(reversed(METADATA.items())) if number % 2 else METADATA)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_without_metadata(tmp_path):
    save_tensor_file(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3))
