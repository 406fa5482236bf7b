"""Text from untrusted files on the terminal."""

from __future__ import annotations

import logging
import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, bidirectional formatting, surrogates, line and paragraph separators


def printable(text: str) -> str:
    """The text with U+FFFD for control characters, which could rewrite the terminal; newlines and tabs are kept."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else "\ufffd" for c in text)


class PrintableFormatter(logging.Formatter):
    """A log formatter whose output is `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
