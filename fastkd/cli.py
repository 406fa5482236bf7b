"""The `fastkd` command line: parses arguments, calls one of fastkd.commands, and prints errors as one line.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Only the standard library and tyro are loaded at start-up.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from fastkd import progress
from fastkd.signals import Interrupted
from fastkd.text import PrintableFormatter, printable

DESCRIPTION = """Train object detectors with knowledge distillation.

First time here? `fastkd demo` trains a small detector with and without distillation and writes a report (15 minutes).
`fastkd COMMAND --help` explains a command. Errors are one line; --debug (or FASTKD_DEBUG=1) shows the traceback.
Long work shows its rate and the time left on a terminal; --quiet shows results, warnings and errors only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastkd` and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return run_and_explain(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has exited, as in `fastkd --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run_and_explain(args: list[str]) -> int:
    """Run the command; print an error as one line and return the exit code."""
    debug = "--debug" in args or os.environ.get("FASTKD_DEBUG", "") not in ("", "0")
    quiet = "--quiet" in args
    args = [arg for arg in args if arg not in ("--debug", "--quiet")]
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("fastkd: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fastkd").setLevel(logging.WARNING if quiet else logging.INFO)
    progress.be_quiet(quiet)
    try:
        try:
            run(args)
        finally:
            progress.close()
    except Interrupted as stop:
        complain(f"interrupted, everything is saved{how_to_continue(args)}")
        return stop.exit_code
    except KeyboardInterrupt:
        complain(f"interrupted{how_to_continue(args)}")
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        complain(f"error: {one_line(error)}{how_to_make_room(error, args)}")
        if not explained(error):
            print("(the same command with --debug shows the traceback)", file=sys.stderr)
        return 2 if bad_input(error) else 1
    return 0


def run(args: list[str]) -> None:
    """Parse the arguments and run the command they name."""
    if args[:1] == ["train"]:
        from fastkd.commands.train import main as main_of_train

        return main_of_train(args[1:])
    if args[:1] == ["doctor"]:
        from fastkd.commands.doctor import main as main_of_doctor

        return main_of_doctor(args[1:])
    import tyro

    from fastkd.commands import convert, data, demo, doctor, evaluate, export, info, predict, report, train

    flags = (tyro.conf.FlagCreatePairsOff,)
    data_group = tyro.extras.SubcommandApp()
    data_group.command(name="scenes")(data.scenes)
    data_group.command(name="crowd")(data.crowd)
    data_group.command(name="tile")(data.tile)
    app = tyro.extras.SubcommandApp()
    app.command(name="demo")(demo.demo)
    app.command(data_group, name="data")
    app.command(name="recipes")(train.recipes)
    app.command(name="doctor")(doctor.doctor)
    app.command(name="train")(train.train)
    app.command(name="convert")(convert.convert)
    app.command(name="evaluate")(evaluate.evaluate)
    app.command(name="predict")(predict.predict)
    app.command(name="export")(export.export)
    app.command(name="report")(report.report)
    app.command(name="info")(info.info)
    app.cli(args=args or ["--help"], prog="fastkd", description=DESCRIPTION, config=flags)


def ours(error: BaseException) -> bool:
    """Whether the error's class is defined in fastkd, so that its message is meant for the user."""
    return type(error).__module__.split(".")[0] == "fastkd"


def bad_input(error: BaseException) -> bool:
    """Whether the error is due to the user's input: files, options, run directories."""
    return isinstance(error, (ValueError, OSError)) or (ours(error) and isinstance(error, RuntimeError))


def explained(error: BaseException) -> bool:
    """Whether the message is sufficient without a traceback."""
    return ours(error) or isinstance(error, (ValueError, OSError))


def one_line(error: BaseException) -> str:
    """The error's message, with its type unless the message is self-explanatory."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if text and explained(error) else f"{type(error).__name__}: {text}".rstrip(": ")


def how_to_continue(args: list[str]) -> str:
    """The command that continues an interrupted one, or begins it anew if it keeps nothing."""
    if args[:1] == ["train"] and "--resume" not in args:
        args = [*args, "--resume"]
    if args[:1] in (["train"], ["demo"]):
        return f"; continue with: fastkd {shlex.join(args)}"
    return f"; begin anew with: fastkd {shlex.join(args)}"


def how_to_make_room(error: BaseException, args: list[str]) -> str:
    """What to do about a full disk; empty for other errors."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"; free some space{how_to_continue(args)}" if full else ""


def complain(message: str) -> None:
    """Prints a message with the program's name on stderr."""
    print(f"fastkd: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
