"""Docstrings of this repository as mkdocstrings shows them: formulas and shapes are text, not Markdown."""

import re

import griffe

ENTRIES = re.compile(r"(Args|Attributes):$")
LABEL = re.compile(r"(Args|Attributes|Returns|Raises|Source): ?")
ENTRY = re.compile(r" {4}([\w, ]+): ")


class PlainDocstrings(griffe.Extension):
    """Escapes Markdown in docstrings and labels the parts that are not lists of arguments."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring with its special characters escaped; `Returns: ...` becomes a paragraph with a bold label."""
    lines, in_entries = [], False
    for line in docstring.split("\n"):
        label, entry = LABEL.match(line), ENTRY.match(line)
        if ENTRIES.match(line):
            in_entries = True
            lines += ["", line]
        elif label:
            in_entries = False
            lines += ["", f"**{label[1]}:** {escaped(line[label.end() :])}"]
        elif in_entries:
            start = entry.end() if entry else len(line) - len(line.lstrip())
            lines.append(line[:start] + escaped(line[start:]))
        else:
            lines.append(escaped(line.strip()))
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Markdown's special characters escaped, but inside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#])", r"\\\1", part) for part in parts)
