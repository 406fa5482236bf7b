"""Every citation of docs/methods.md names a section of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastkd", "csrc", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh"}
NUMBER = r"\d+(?:\.\d+)?"
# "methods 2.1", "methods.md section 2", "methods 1.4, 1.5 and 3"
CITATION = re.compile(rf"\bmethods(?:\.md)?(?:,? sections?)? ({NUMBER}(?:(?:, | and ){NUMBER})*)")
HEADING = re.compile(rf"^#+ ({NUMBER})\.? ", re.MULTILINE)


def sections():
    return set(HEADING.findall((ROOT / "docs/methods.md").read_text(encoding="utf-8")))


def cited_sections(text):
    return [number for match in CITATION.finditer(text) for number in re.findall(NUMBER, match.group(1))]


def sources():
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]


def dangling(text, known):
    return [number for number in cited_sections(text) if number not in known]


def test_every_citation_resolves():
    known, cited, wrong = sections(), set(), []
    for path in sources():
        if path == Path(__file__).resolve():
            continue  # its examples are made up
        text = path.read_text(encoding="utf-8")
        cited.update(cited_sections(text))
        wrong += [f"{path.relative_to(ROOT)}: methods {number}" for number in dangling(text, known)]
    assert not wrong
    assert {"1.1", "1.2", "1.3", "1.4", "2", "2.1", "2.2", "2.3", "2.4", "3", "4", "5"} <= cited


@pytest.mark.parametrize(("text", "numbers"), [
    ("a loss (methods 9.9)", ["9.9"]),
    ("Source: methods.md section 12.", ["12"]),
    ("docs/methods.md sections 2.1 and 2.7", ["2.7"]),
    ("(methods 1.4, 1.6, 3)", ["1.6"]),
])  # fmt: skip
def test_a_made_up_citation_is_noticed(text, numbers):
    assert dangling(text, sections()) == numbers


def test_what_is_no_citation():
    assert not cited_sections("three methods on 4 images; a method 2 of them share; methods: 3")


def test_sections_are_those_that_the_code_cites():
    assert {str(number) for number in range(1, 10)} <= sections()
    assert {f"{method}.{part}" for method in (1, 2) for part in range(1, 6)} <= sections()
