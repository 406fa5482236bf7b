"""Every `fastkd ...` command of the pages is parsed by the command line's own parser; nothing is run."""

import contextlib
import functools
import re
import shlex
from pathlib import Path

import pytest

from fastkd import cli
from fastkd.commands import convert, data, demo, doctor, evaluate, export, info, predict, report, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:torchrun |fastkd )[^`]*)`(?!`)")
COMMANDS = {  # the functions that run, by module
    convert: ("convert",),
    data: ("scenes", "crowd"),
    demo: ("demo",),
    doctor: ("run",),
    evaluate: ("evaluate",),
    export: ("export",),
    info: ("info",),
    predict: ("predict",),
    report: ("report",),
    train: ("run", "recipes"),
}
EXAMPLES = {"RECIPE": "scenes-retinanet-lgd", "RUN...": "RUN", "N": "4", "OUT.safetensors": "out.safetensors"}


def commands(text: str) -> list[list[str]]:
    """The arguments of each command, without `fastkd` or torchrun's part; placeholders replaced by examples."""
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]
    found = []
    for line in lines:
        match = re.search(r"(?:^|\s)(?:fastkd|-m fastkd\.cli)\s+([a-z].*)", line)
        if match and not re.search(r"[<\[]", line):  # a pattern of commands
            words = shlex.split(match[1], comments=True)
            found.append([EXAMPLES.get(word, word) for word in words if word not in ("...", "COMMAND")])
    return found


def cases() -> list:
    found = {}
    for page in PAGES:
        for words in commands(page.read_text(encoding="utf-8")):
            found.setdefault(shlex.join(words), (page.relative_to(ROOT).as_posix(), words))
    return [pytest.param(words, id=f"{page}: {text}") for text, (page, words) in found.items()]


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """Replaces what the commands run; returns the list of what they would have."""
    called = []

    def replaced(function):
        @functools.wraps(function)  # with its signature, which the parser reads
        def record(*args, **kwargs):
            called.append((function.__name__, args, kwargs))

        return record

    for module, functions in COMMANDS.items():
        for name in functions:
            monkeypatch.setattr(module, name, replaced(getattr(module, name)))
    own = "from fastkd.detectors.retinanet import RetinaNet\n\n\nclass MyDetector(RetinaNet):\n    pass\n"
    (tmp_path / "my_module.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    return called


@pytest.mark.parametrize("words", cases())
def test_commands_of_the_pages_parse(words, parse_only):
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            cli.run(words)
        assert stop.value.code == 0
    else:
        cli.run(words)
        assert len(parse_only) == 1


def test_faults_are_found(parse_only):
    block = "fastkd train scenes-retinanet-icd --no-such-option 1 \\\n    --seed 1  # why"
    text = f"```sh\n{block}\n```\nand `fastkd infos`.\n"
    wrong, unknown = commands(text)
    assert wrong == ["train", "scenes-retinanet-icd", "--no-such-option", "1", "--seed", "1"]
    for words in (wrong, unknown):
        with contextlib.redirect_stderr(None), pytest.raises(SystemExit) as stop:
            cli.run(words)
        assert stop.value.code == 2
