"""Hooks of mkdocs: pages of the repository outside of docs/, the rest of the navigation, GitHub's lists and links."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # linked from docs/, and shown
FOLDERS = {"results": "Results", "integrations": "Integrations", "tutorials": "Tutorials"}  # folder: section of nav
LIST_ITEM = re.compile(r"( *)([-*]|\d+\.) ")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_config(config):
    """Append the pages that nav does not name to their section, so that a new page needs no entry."""
    sections = {name: pages for entry in config.nav for name, pages in entry.items() if isinstance(pages, list)}
    named = str(config.nav)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.relative_to(ROOT / "docs")
        if f"'{page.as_posix()}'" not in named:
            sections[FOLDERS.get(page.parts[0], "Reference")].append(page.as_posix())


def on_files(files, config):
    """Add the pages outside of docs/, and each example as a page."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))


def on_page_markdown(markdown, page, config, files):
    """GitHub's Markdown as Python-Markdown reads it, with links to files of the repository as links to their pages."""
    source = page.file.src_uri
    folder = "" if source in PAGES or source.startswith("examples/") else "docs"

    def to_page(match):
        target = os.path.normpath(os.path.join(folder, os.path.dirname(source), match[1]))
        if target.startswith("examples/") and target.endswith(".py"):
            target = target[:-3] + ".md"
        inside = target.removeprefix("docs/")
        return "](" + os.path.relpath(inside, os.path.dirname(source) or ".")

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(to_page, spaced_lists(part)) for part in parts)


def spaced_lists(text):
    """A blank line before each list, and four spaces before nested items, as Python-Markdown wants them."""
    lines, inside = [], False
    for line in text.split("\n"):
        item = LIST_ITEM.match(line)
        if item and not inside and lines and lines[-1].strip():
            lines.append("")
        inside = bool(item) or (inside and (line.startswith(" ") or not line.strip()))
        lines.append("    " + line.lstrip() if item and item[1] else line)
    return "\n".join(lines)
