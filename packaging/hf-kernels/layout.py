"""Writes fastkd's attention ops as a kernel for Hugging Face's `kernels`: `python packaging/hf-kernels/layout.py OUT`.

OUT becomes a source tree for kernel-builder (build.toml, torch-ext/fastkd, tests) with the built variants in OUT/build,
which `kernels.get_local_kernel(OUT)` loads. The kernel is noarch, formerly called universal: Triton and plain torch,
nothing compiled. Such kernels are loaded under a name of their own, possibly several versions in one process: imports
of fastkd become relative, and the namespace of the ops contains a hash of their sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "fastkd"
BACKENDS = ("cuda", "cpu")
COPIED = (
    "ops/attention_mass.py",
    "ops/instance_attention.py",
    "ops/_support/__init__.py",
    "ops/_support/checks.py",
    "ops/_support/coverage.py",
    "ops/_support/layout.py",
    "ops/_support/registration.py",
    "ops/triton/__init__.py",
    "ops/triton/attention_backward.py",
    "ops/triton/attention_forward.py",
    "ops/triton/attention_mass.py",
    "ops/triton/configurations.py",
    "ops/triton/plan.py",
    "ops/triton/tiles.py",
)


def sources() -> dict[str, str]:
    """Path in the package -> text: the files kept beside this script, and those of fastkd."""
    own = HERE / "torch-ext" / "fastkd"
    found = {path.relative_to(own).as_posix(): path.read_text(encoding="utf-8") for path in own.rglob("*.py")}
    return found | {name: (PACKAGE / name).read_text(encoding="utf-8") for name in COPIED}


def relative_imports(name: str, text: str) -> str:
    """`from fastkd.x import y` as a relative import from the file `name` of the package."""
    dots = "." * (name.count("/") + 1)
    return re.sub(r"(?m)^(\s*)from fastkd\.", rf"\1from {dots}", text)


def namespaced(text: str, namespace: str) -> str:
    """The ops under this namespace of torch.ops."""
    return text.replace("torch.ops.fastkd", f"torch.ops.{namespace}").replace("fastkd::", f"{namespace}::")


def write_package(found: dict[str, str], folder: Path, namespace: str) -> None:
    """Write the sources with relative imports and their ops in a namespace."""
    for name, text in found.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(namespaced(relative_imports(name, text), namespace), encoding="utf-8")


def write(out: Path) -> None:
    """Write the tree."""
    found = sources()
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]
    write_package(found, out / "torch-ext" / "fastkd", f"_fastkd_{digest}")
    for name in ("build.toml", "README.md", "tests"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, out / name)
    shutil.copy(PACKAGE.parent / "LICENSE", out / "LICENSE")
    version = int(re.search(r"(?m)^version = (\d+)$", (HERE / "build.toml").read_text(encoding="utf-8"))[1])
    for backend in BACKENDS:
        variant, identity = out / "build" / f"torch-{backend}", f"_fastkd_{backend}_{digest}"
        write_package(found, variant, identity)
        metadata = {
            "id": identity,
            "name": "fastkd",
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write the tree to a new or empty folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out = parser.parse_args(arguments).out
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} must be empty; remove it or name another folder")
    write(out)


if __name__ == "__main__":
    main()
