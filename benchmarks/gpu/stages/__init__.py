"""The stages of benchmarks/gpu/check.py: what each records, written to its JSON file as soon as it is known."""

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
    """What a stage is given.

    Args:
        device: "cuda" or "cpu".
        toy: the smallest sizes, for a rehearsal.
        file: where `record` writes, None for nowhere.
        seconds: the stage's time limit.
        found: what was recorded so far.
    """

    device: str
    toy: bool = False
    file: Path | None = None
    seconds: float = 60.0
    found: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def from_environment(cls, device: str, toy: bool) -> Context:
        """The context that benchmarks/gpu/check.py has set up."""
        file = os.environ.get("FASTKD_STAGE_FILE")
        seconds = float(os.environ.get("FASTKD_STAGE_SECONDS", "60"))
        return cls(device, toy, Path(file) if file else None, seconds)

    @property
    def left(self) -> float:
        """Seconds until the limit, five kept back for the end."""
        return self.seconds - 5 - (time.monotonic() - self.begin)

    def record(self, name: str, value: Any) -> None:
        """Adds an entry; the file is written anew."""
        self.found[name] = value
        if self.file is not None:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            partial.replace(self.file)

    def attempt(self, name: str, work: Callable[[], Any]) -> bool:
        """Records what `work` returns, or {"error": ...} where it raises; returns whether it did not raise."""
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
