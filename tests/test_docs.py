"""The pages written by hand: width of their prose, and links to files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/results/findings.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "integrations").glob("*.md")),
]
WIDTH = 120


def too_long(text: str) -> list[str]:
    """Lines beyond the width, but for tables and code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    return [line for line in prose if len(line) > WIDTH and not line.lstrip().startswith("|")]


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to files that do not exist."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    return [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_prose_is_narrow_and_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert too_long(text) == []
    assert broken_links(page, text) == []


def test_faults_are_found():
    wide = "word " * 30
    assert too_long(f"short\n{wide}\n| {wide} |\n```\n{wide}\n```\n") == [wide]
    assert broken_links(ROOT / "README.md", "[a](no/such.md) [b](LICENSE) [c](https://example.com)") == ["no/such.md"]
