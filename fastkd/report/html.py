"""The self-contained HTML page, without scripts or external resources. All escaping of text happens in this module."""

from __future__ import annotations

import base64
import html
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from fastkd.files import naming

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1a1f2b; --soft: #5b6475; --line: #dfe3ea;
  --accent: #0b6bcb; --good: #0a7d4f; --bad: #b3361f; --shade: #f0f3f8; --note: #fff6dd; --note-line: #e2b93b; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --ink: #e7eaf0; --soft: #9aa4b5;
  --line: #303846;
  --accent: #6cb2ff; --good: #4fd39a; --bad: #ff8d75; --shade: #232a35; --note: #2d2815; --note-line: #a88720; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 52px 0 8px; padding-top: 20px; border-top: 1px solid var(--line);
  letter-spacing: -0.01em; }
h3 small { font-weight: 400; margin-left: 6px; }
h3 { font-size: 1.06rem; margin: 28px 0 6px; overflow-wrap: anywhere; }
p { margin: 8px 0 12px; max-width: 78ch; overflow-wrap: anywhere; }
.soft, figcaption, .card small { color: var(--soft); }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav ol { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 18px 0 0; padding: 0; list-style: none;
  font-size: .95rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  border-top: 4px solid var(--run, var(--line)); }
.card b { display: block; font-size: 1.75rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; font-weight: 600; overflow-wrap: anywhere; } .card small { display: block; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 12px 0 16px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); background: var(--shade); vertical-align: bottom; }
th { white-space: normal; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 92px;
  max-width: 300px; }
span.name { white-space: nowrap; }
tr:last-child td { border-bottom: 0; } td.best { font-weight: 700; }
.up { color: var(--good); } .down { color: var(--bad); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em;
  background: var(--run); }
figure { margin: 14px 0 22px; } figcaption { font-size: .9rem; margin-top: 6px; max-width: 90ch;
  overflow-wrap: anywhere; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 10px; border: 1px solid var(--line);
  background: #fff; }
.grid { display: grid; gap: 14px; align-items: start; } .grid figure { margin: 0; } .grid img { width: 100%;
  border-radius: 6px; }
.grid figcaption { font-size: .84rem; line-height: 1.35; }
.note { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 6px; padding: 10px 14px;
  margin: 12px 0; font-size: .93rem; overflow-wrap: anywhere; }
.note ul { margin: 4px 0; padding-left: 20px; }
.key { display: inline-block; width: 1.15em; height: .85em; border: 3px solid var(--colour);
  margin: 0 .35em 0 .1em;
  vertical-align: -1px; border-radius: 2px; outline: 1px solid #10141c80; }
.key.dashed { border-style: dashed; outline-color: transparent; background: #10141c80; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); font-weight: 600; }
footer { margin-top: 56px; padding-top: 18px; border-top: 1px solid var(--line); font-size: .86rem;
  color: var(--soft); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { body { background: #fff; } figure, .card, tr { break-inside: avoid; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
{cards}
<nav aria-label="Contents"><ol>{contents}</ol></nav>
</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, CSS classes, and for a run's name the colour of the dot before it."""

    text: str
    kind: str = ""
    colour: str = ""


@dataclass
class Section:
    """A numbered section of the page: its title and HTML fragments."""

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)


class PictureBook:
    """Turns PNG bytes into <img> tags and, if a folder is given, writes them as files.

    Args:
        folder: folder to which every picture is also written as a PNG file, or None.
    Attributes: count and bytes of the pictures so far.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.count = 0
        self.bytes = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def image(self, png: bytes, name: str, alt: str) -> str:
        """An <img> with embedded data. Args: png: bytes; name: stem of the file name; alt: alternative text."""
        self.count += 1
        self.bytes += len(png)
        if self.folder is not None:
            path = self.folder / f"{self.count:03d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:80]}.png"
            with naming(path):
                path.write_bytes(png)
        data = base64.b64encode(png).decode("ascii")
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'

    def figure(self, png: bytes, name: str, alt: str, caption: str) -> str:
        """A picture with a caption; the caption is HTML made by this module or escaped by the caller."""
        return f"<figure>{self.image(png, name, alt)}<figcaption>{caption}</figcaption></figure>"


def clean(text, limit: int = 80) -> str:
    """`text` on one line, without control and bidirectional formatting characters, at most `limit` characters long."""
    characters = (" " if c.isspace() else c for c in str(text))
    kept = "".join(c for c in characters if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    kept = re.sub(r" +", " ", kept).strip()
    return kept if len(kept) <= limit else kept[: limit - 1] + "\u2026"


def escape(text, limit: int = 400) -> str:
    """`text` escaped for HTML text and attributes (file and class names come from untrusted files)."""
    return html.escape(clean(text, limit), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph with the given HTML."""
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


def note(lines) -> str:
    """A highlighted box of plain-text lines; "" for none."""
    lines = [escape(line) for line in lines]
    if not lines:
        return ""
    if len(lines) == 1:
        return f'<div class="note">{lines[0]}</div>'
    return '<div class="note"><ul>' + "".join(f"<li>{line}</li>" for line in lines) + "</ul></div>"


def table(header: list[str], rows: list[list], text_columns: int = 1) -> str:
    """A table with `text_columns` text columns, followed by right-aligned numbers.

    Args: header: plain texts; rows: lists of plain texts or Cells.
    """

    def classes(column: int, kind: str = "") -> str:
        names = " ".join(part for part in ("text" if column < text_columns else "", kind) if part)
        return f' class="{names}"' if names else ""

    def cell(column: int, value) -> str:
        value = value if isinstance(value, Cell) else Cell(str(value))
        dot = f'<span class="dot" style="--run:{escape(value.colour)}"></span>' if value.colour else ""
        text = dot + escape(value.text)
        if dot and len(value.text) <= 24:
            text = f'<span class="name">{text}</span>'
        return f"<td{classes(column, value.kind)}>{text}</td>"

    head = "".join(f"<th{classes(column)}>{escape(text)}</th>" for column, text in enumerate(header))
    body = "".join(
        "<tr>" + "".join(cell(column, value) for column, value in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def card(name: str, value: str, remark: str, colour: str) -> str:
    """A summary card: a run, its AP and one remark."""
    return (
        f'<div class="card" style="--run:{escape(colour)}"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(remark)}</small></div>"
    )


def grid(figures: list[str], width: int = 220) -> str:
    """Figures side by side, as many as fit, each at least `width` pixels wide."""
    return (
        f'<div class="grid" style="grid-template-columns:repeat(auto-fill,minmax({int(width)}px,1fr))">'
        + "".join(figures)
        + "</div>"
    )


def folded(summary: str, content: str) -> str:
    """Collapsed content (<details>), without JavaScript."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def key(colour: str, text: str, dashed: bool = False) -> str:
    """A legend entry: a small coloured frame and its meaning."""
    return f'<span class="key{" dashed" if dashed else ""}" style="--colour:{escape(colour)}"></span>{escape(text)}'


def page(title: str, subtitle: str, cards: list[str], sections: list[Section], footer: str) -> str:
    """The whole page. `subtitle`, `cards` and `footer` are HTML; the title is plain text."""
    filled = [section for section in sections if section.parts]
    contents = "".join(f'<li><a href="#{s.anchor}">{i}. {escape(s.title)}</a></li>' for i, s in enumerate(filled, 1))
    body = "".join(
        f'<section id="{s.anchor}"><h2>{i}. {escape(s.title)}</h2>\n' + "\n".join(s.parts) + "</section>\n"
        for i, s in enumerate(filled, 1)
    )
    cards_html = f'<div class="cards">{"".join(cards)}</div>' if cards else ""
    return PAGE.format(
        title=escape(title),
        style=STYLE,
        subtitle=subtitle,
        cards=cards_html,
        contents=contents,
        sections=body,
        footer=footer,
    )
