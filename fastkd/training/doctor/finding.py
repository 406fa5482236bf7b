"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        status: "problem" is likely to spoil the run, "warning" may be meant.
        check: what was looked at, in a word or two.
        message: what was found, and what to do where that is wrong.
    """

    status: Status
    check: str
    message: str
