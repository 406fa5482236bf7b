"""The C++ and CUDA sources that are shipped."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(*patterns: str) -> list[Path]:
    """Files of csrc that match one of the patterns, without the emulation of CUDA."""
    found = {path for pattern in patterns for path in (ROOT / "csrc").rglob(pattern)}
    return sorted(path for path in found if path.parent.name != "simt")
