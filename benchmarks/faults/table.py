"""The page docs/results/faults.md of the figures in faults.json."""

from __future__ import annotations

from typing import Any

from fastkd.text import printable

TITLES = {
    "full-disk": "A disk that becomes full",
    "read-only": "A read-only file system",
    "clock": "A clock that jumps back",
    "checkpoints": "Damaged checkpoints",
    "images": "Images that change while training",
    "annotations": "Annotation files that change while training",
    "worker": "A loader process that dies",
    "teacher": "A teacher's file that is swapped",
}
HEAD = """# Fault campaign

`python -m benchmarks.faults` (figures in faults.json; the same command goes on with what is missing).
The run is a tiny RetinaNet with FGFI (LGD where so said): 8 steps, one loader process, a checkpoint every second step,
an evaluation in the middle. A fault counts as survived if the resumed run has the weights, optimiser states, log lines
and detections of an undisturbed run, bit for bit, and leaves no other files; or, where fastkd must refuse, if it says
so in one line.
"""


def page(figures: dict[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD]
    kills = (
        ("kills", "SIGKILL of a run in one process", "at random moments and after a saving began"),
        ("two", "SIGKILL of one of two processes", "under torchrun's agent, which restarts both; workers are forked"),
    )
    for name, title, how in kills:
        own = figures.get(name)
        if own:
            parts.append(
                f"## {title}\n\n**{own['kills']} kills** in {own['runs']} runs, {how}, each resumed: {_count(own)}. "
                f"{own['seconds'] / 60:.0f} minutes, commit {own['commit']}{_machine(own)}.\n\n"
                "| killed while | kills |\n|---|--:|\n"
                + "".join(f"| {phase} | {count} |\n" for phase, count in own["phases"].items())
            )
    for name, title in TITLES.items():
        own = figures.get(name)
        if own:
            rows = "".join(f"| {_cell(row['fault'])} | {_cell(row['said'])} |\n" for row in own["examples"])
            parts.append(
                f"## {title}\n\n**{own['cases']} cases** ({own.get('run', 'scenes-retinanet-lgd')}): {_count(own)}. "
                f"{own['seconds'] / 60:.1f} minutes, commit {own['commit']}{_machine(own)}. Of each kind one:\n\n"
                f"| fault | last line of the output |\n|---|---|\n{rows}"
            )
    return "\n".join(parts)


def _machine(own: dict[str, Any]) -> str:
    return f", {own['machine']}" if "machine" in own else ""


def _count(own: dict[str, Any]) -> str:
    problems = len(own.get("problems", []))
    return (
        f"{problems} problems are open, see faults.json" if problems else "all were survived or refused as they should"
    )


def _cell(text: str) -> str:
    """Text for a table cell, at most 260 characters."""
    text = printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 260 else text[:259] + "…"
