"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        status: "ok"; "warning" may be intended; "problem" is likely to spoil the run.
        check: name of the check, one or two words.
        message: the result, and a remedy if it is a problem.
    """

    status: Status
    check: str
    message: str
