"""Progress of long work: what the line says, when it is silent, and Ctrl-C on a real terminal."""

import io
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastkd import cli, progress


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    progress.close()
    progress.be_quiet(False)


def console(terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((120, 500, 4.0, 30.0, "images"), "120/500 images  30.0 images/s  13 s left"),
        ((120, 500, 4.0, None, "images"), "120/500 images  30.0 images/s  13 s left"),
        ((1500, 200_000, 10.0, 100.0, "boxes"), "1,500/200,000 boxes  100.0 boxes/s  33:05 min left"),
        ((3, None, 6.0, 0.5, "runs"), "3 runs  0.5 runs/s"),
        ((0, 500, 7.4, None, "images"), "7 s"),
        ((0, None, 4000.0, None, ""), "1:06 h"),
    ],
    ids=str,
)
def test_figures(arguments, text):
    assert progress.figures(*arguments) == text


def test_track_shows_rate_and_time_left_and_yields_every_item(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    terminal, seen = console(), []
    for item in progress.track(range(40), "evaluate", "images", console=terminal):
        seen.append(item)
        time.sleep(0.02)
    text = terminal.file.getvalue()
    assert seen == list(range(40))
    assert "evaluate" in text and "/40 images" in text and " images/s" in text and " left" in text


def test_nested_work_shares_one_display():
    terminal = console()
    with progress.showing("outer", "steps", 2, console=terminal), progress.showing("inner"):
        time.sleep(0.6)
    text = terminal.file.getvalue()
    assert "outer" in text and "inner" in text
    with progress.showing("next", console=terminal):
        time.sleep(0.3)
    assert "next" in terminal.file.getvalue()[len(text) :]


@pytest.mark.parametrize("reason", ["not a terminal", "quiet", "another process"])
def test_no_progress_is_shown_if(reason, monkeypatch):
    terminal = console(terminal=reason != "not a terminal")
    progress.be_quiet(reason == "quiet")
    if reason == "another process":
        monkeypatch.setenv("RANK", "1")
    assert list(progress.track(range(3), "work", "items", console=terminal)) == [0, 1, 2]
    with progress.showing("work", console=terminal) as work:
        work.advance()
    assert terminal.file.getvalue() == ""


def test_an_error_in_the_work_removes_the_display():
    terminal = console()
    with pytest.raises(RuntimeError), progress.showing("work", console=terminal):
        raise RuntimeError
    assert progress._shown is None


def test_command_line_is_quiet_on_request_and_closes_the_display(monkeypatch):
    states = []

    def run(args):
        states.append((args, progress.is_quiet(), logging.getLogger("fastkd").isEnabledFor(logging.INFO)))
        progress._begin(console())
        raise ValueError("no")

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["report", "--quiet", "a"]) == 2 and cli.main(["report", "a"]) == 2
    assert states == [(["report", "a"], True, False), (["report", "a"], False, True)]
    assert progress._shown is None


def in_terminal(arguments, until, then=None, seconds=60):
    """Everything that a command writes to a terminal; when `until` has appeared, the signal `then` is sent."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "fastkd.cli", *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        command, stdout=child, stderr=child, stdin=child, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    os.close(child)
    text, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([parent], [], [], 0.1)[0]:
            try:
                text += os.read(parent, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        if then is not None and until in text:
            os.killpg(process.pid, then)
            then = None
    os.close(parent)
    try:
        return SimpleNamespace(text=text, code=process.wait(timeout=10))
    finally:
        process.kill()


def test_data_generation_on_a_terminal(tmp_path):
    said = in_terminal(["data", "scenes", "--root", tmp_path / "s", "--train", 300, "--val", 2], "images/s")
    assert said.code == 0 and "draw scenes" in said.text and "/302 images" in said.text and " left" in said.text


def test_ctrl_c_in_data_generation_says_how_to_go_on(tmp_path):
    arguments = ["data", "scenes", "--root", tmp_path / "s", "--train", 100000, "--val", 2]
    said = in_terminal(arguments, "images/s", signal.SIGINT)
    assert said.code == 130 and "Traceback" not in said.text
    assert f"begin anew with: fastkd data scenes --root {tmp_path / 's'}" in said.text.replace("\r\n", "")


def test_no_progress_where_there_is_no_terminal(tmp_path):
    arguments = ["data", "scenes", "--root", tmp_path / "s", "--train", "60", "--val", "2"]
    command = [sys.executable, "-m", "fastkd.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "images/s" not in done.stderr and "60 training" in done.stderr
    quiet = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
    assert quiet.returncode == 0 and quiet.stderr == quiet.stdout == ""
