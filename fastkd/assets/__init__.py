"""Weight files shipped with fastkd, verified before use.

SHA256SUMS lists them in the format of `sha256sum`: one "<hex digest>  <file name>" per line.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
PREFIX = "asset:"


def checksums(folder: Path = FOLDER) -> dict[str, str]:
    """File name -> SHA-256 of every asset, from SHA256SUMS; empty if there is no such file."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        return {}
    sums = {}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.strip():
            digest, name = line.split(maxsplit=1)
            sums[name.lstrip("*")] = digest.lower()
    return sums


def asset(name: str, folder: Path = FOLDER) -> Path:
    """The path of a shipped weight file, after verifying its SHA-256.

    Raises: ValueError if there is no such asset, its file is missing, or its checksum is wrong.
    """
    sums = checksums(folder)
    if name not in sums:
        known = ", ".join(sorted(sums)) or "none"
        raise ValueError(f"asset: name must be one of the shipped files ({known}), got {name!r}")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"asset: {path} must exist, got no such file; install fastkd again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sums[name]:
        raise ValueError(
            f"asset: {path} must have SHA-256 {sums[name][:12]}.., got {digest[:12]}..; the file is "
            "damaged or incomplete, install fastkd again (in a git clone: git checkout -- fastkd/assets)"
        )
    return path


def resolve(name: str | Path) -> Path:
    """The file that a recipe names: the verified asset for "asset:NAME", otherwise the path itself."""
    text = str(name)
    return asset(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)
