"""Every `fastkd ...` command of the pages is parsed by the command line's own parser; nothing is run."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import coco_files
import pytest

from fastkd import cli
from fastkd.commands import convert, data, demo, doctor, evaluate, export, info, predict, report, train

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "results")  # those record old runs
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:torchrun |fastkd )[^`]*)`(?!`)")
MODULES = (convert, data, demo, evaluate, export, info, predict, report)
RUNNING = {train: ("run", "recipes"), doctor: ("run",)}  # in these two the rest parses
TRAINING = ("quickstart", "faq", "commands", "limits", "detectors", "performance")
FOREIGN = {"--max-restarts", "--nproc-per-node", "--study"}  # of torchrun and of benchmarks.study
EXAMPLES = {"RECIPE": "scenes-retinanet-lgd", "RUN...": "RUN", "N": "4", "OUT.safetensors": "out.safetensors",
            "module:Class": "my_module:MyDetector"}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The arguments of each command, without `fastkd` or torchrun's part; placeholders replaced by examples."""
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]
    name = re.compile(r"fastkd (data )?\w+")  # a command that a sentence speaks of
    lines += [code + " --help" if name.fullmatch(code) else code for code in inline]
    found = []
    for line in lines:
        match = re.search(r"(?:^|\s)(?:fastkd|-m fastkd\.cli)\s+([a-z].*)", line)
        if match and not re.search(r"[<\[]|\w-?\.\.\.", line.replace("RUN...", "RUN")):  # not a pattern of commands
            words = shlex.split(re.split(r"\s[&|>]", match[1])[0], comments=True)
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

    own = {module: [name for name, _ in inspect.getmembers(module, inspect.isfunction)] for module in MODULES}
    for module, names in (own | RUNNING).items():
        for name in names:
            if getattr(module, name).__module__ == module.__name__:
                monkeypatch.setattr(module, name, replaced(getattr(module, name)))
    text = "from fastkd.detectors.retinanet import RetinaNet\n\n\nclass MyDetector(RetinaNet):\n    pass\n"
    (tmp_path / "my_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return called


def write_data(words: list[str]) -> None:
    """The training set that a recipe fitted to its data reads while its options are parsed."""
    if any(word.startswith("custom-") for word in words) and "--data.root" in words:
        root = Path(words[words.index("--data.root") + 1])
        file, images = coco_files.write_folder(root)
        images.rename(root / "train")
        (root / "annotations").mkdir()
        file.rename(root / "annotations" / "train.json")


@pytest.mark.parametrize("words", cases())
def test_commands_of_the_pages_parse(words, parse_only):
    write_data(words)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            cli.run(words)
        assert stop.value.code == 0
    else:
        cli.run(words)
        assert len(parse_only) == 1


def options(page: Path) -> set[str]:
    """The options in a page's inline code."""
    code = " ".join(re.findall(r"`([^`]*)`", FENCE.sub("", page.read_text(encoding="utf-8"))))
    return set(re.findall(r"(?<!\S)--[a-z][\w.-]*", code)) - FOREIGN


def test_options_of_the_pages_exist(capsys, monkeypatch):
    """For the pages on training, whose options belong to no whole command."""
    monkeypatch.setenv("COLUMNS", "200")
    trained = [f"train scenes-retinanet-{method}" for method in ("icd", "lgd")]
    for command in (*trained, "train", "doctor scenes-retinanet-icd", "report", "evaluate", "data scenes", "demo"):
        with pytest.raises(SystemExit):
            cli.run([*command.split(), "--help"])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) | {"--debug"}
    pages = [*(ROOT / "docs" / "tutorials").glob("*.md"), *(ROOT / "docs" / f"{name}.md" for name in TRAINING)]
    used = {page.name: options(page) - known for page in pages}
    assert {name: unknown for name, unknown in used.items() if unknown} == {}


def test_faults_are_found(parse_only):
    block = "fastkd train scenes-retinanet-icd --no-such-option 1 \\\n    --seed 1  # why"
    text = f"```sh\n{block}\n```\nand `fastkd infos --x`.\n"
    wrong, unknown = commands(text)
    assert wrong == ["train", "scenes-retinanet-icd", "--no-such-option", "1", "--seed", "1"]
    for words in (wrong, unknown):
        with pytest.raises(SystemExit) as stop:
            cli.run(words)
        assert stop.value.code == 2
