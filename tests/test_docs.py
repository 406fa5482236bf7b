"""The pages written by hand: width of their prose, links and their anchors, figures of the pages that they cite."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BY_COMMANDS = set((DOCS / "results").glob("*.md")) - {DOCS / "results" / name for name in ("findings.md", "index.md")}
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
WRITTEN = [page for page in PAGES if page not in BY_COMMANDS]
WIDTH = 120
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w.])")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def too_long(text: str) -> list[str]:
    """Lines beyond the width, but for tables and code."""
    return [line for line in without_code(text).splitlines() if len(line) > WIDTH and not line.lstrip().startswith("|")]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to files that do not exist, or to headings that a page does not have."""
    broken = []
    for target, anchor in LINK.findall(without_code(text)):
        path = page.parent / target if target else page
        if not path.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if target else text):
            broken.append(f"{target}#{anchor}")
    return broken


def unknown_figures(page: Path, text: str) -> list[str]:
    """Numbers in tables of figures that the page of docs/results cited last before the table does not have."""
    source, found = "", []
    for line in text.splitlines():
        source = "" if line.startswith("## ") else source
        cited = [target for target, _ in LINK.findall(line) if "results/" in target and target.endswith(".md")]
        if cited:
            source = (page.parent / cited[-1]).read_text(encoding="utf-8")
        if line.startswith("|") and source:
            cells = re.sub(r"[*()]", " ", line).split("|")[2:]  # without the first column, which names the row
            found += [number for number in NUMBER.findall(" ".join(cells)) if number not in source]
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=names(WRITTEN))
def test_prose_is_narrow_and_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert too_long(text) == []
    assert broken_links(page, text) == []


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "performance.md"], ids=lambda page: page.name)
def test_figures_are_those_of_the_page_cited_before_the_table(page):
    assert unknown_figures(page, page.read_text(encoding="utf-8")) == []


def test_faults_are_found():
    wide = "word " * 30
    assert too_long(f"short\n{wide}\n| {wide} |\n```\n{wide}\n```\n") == [wide]
    text = "[a](no/such.md) [b](LICENSE) [c](https://example.com) [d](README.md#no-such-heading) [e](#here)\n# Here\n"
    assert broken_links(ROOT / "README.md", text) == ["no/such.md", "README.md#no-such-heading"]
    text = "[x](docs/results/ops.md)\n| box_pool, 99999 | 123456.5 | 5.01 |\n"
    assert unknown_figures(ROOT / "README.md", text) == ["123456.5"]
