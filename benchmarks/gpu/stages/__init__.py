"""The stages of benchmarks/gpu/check.py; each record is written to the stage's JSON file at once."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Context:
    """The context of a stage.

    Args:
        device: "cuda" or "cpu".
        toy: minimal sizes, for a rehearsal.
        file: output of `record`, or None.
        seconds: the stage's time limit.
        found: the records so far.
    """

    device: str
    toy: bool = False
    file: Path | None = None
    seconds: float = 60.0
    found: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def from_environment(cls, device: str, toy: bool) -> Context:
        """The context set up by benchmarks/gpu/check.py."""
        file = os.environ.get("FASTKD_STAGE_FILE")
        seconds = float(os.environ.get("FASTKD_STAGE_SECONDS", "60"))
        return cls(device, toy, Path(file) if file else None, seconds)

    @property
    def left(self) -> float:
        """Seconds until the limit, minus a reserve of five."""
        return self.seconds - 5 - (time.monotonic() - self.begin)

    def record(self, name: str, value: Any) -> None:
        """Add an entry and rewrite the file."""
        self.found[name] = value
        if self.file is not None:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            partial.replace(self.file)

    def attempt(self, name: str, work: Callable[[], Any]) -> bool:
        """Record the result of `work`, or {"error": ...} if it raises; return whether it succeeded."""
        try:
            value = work()
        except Exception as error:
            traceback.print_exc()
            self.record(name, {"error": f"{type(error).__name__}: {error}"[:1000]})
            return False
        self.record(name, value)
        return True


def failures(found: dict[str, Any]) -> list[str]:
    """Names of the entries that are errors."""
    return [name for name, value in found.items() if isinstance(value, dict) and "error" in value]
