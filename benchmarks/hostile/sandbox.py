"""Reads mutated files in forked processes with limits on time and memory, and judges what happened."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hostile.readers import Reader

SECONDS = 5.0  # the most that a case may take
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")
MARK = "hostile-mark"
MEASURED = ("/proc/self/clear_refs", "/proc/self/status")  # read here, for the memory of a case
CHUNK = 500  # cases of one process


def random_of(reader: Reader, number: int) -> random.Random:
    """The random numbers of a case."""
    return random.Random(f"{reader.name} {number}")


def mutated(reader: Reader, number: int, content: bytes) -> bytes:
    """The file of a case; code in it would make the file MARK in the working directory."""
    return reader.mutate(random_of(reader, number), content, MARK)


def judge(reader: Reader, path: Path, violations: list[str]) -> dict[str, Any]:
    """Reads the file; returns `kind` ("read", "refused" or "wrong"), what was said, and time and memory."""
    _reset_peak()
    before, begin = _peak(), time.perf_counter()
    kind, said = "read", ""
    try:
        reader.read(path)
    except (ValueError, OSError) as error:
        kind, said = "refused", f"{type(error).__name__}: {error}"
        if str(path.parent) not in said:  # the file, or an image that it names
            kind, said = "wrong", f"does not name the file: {said}"
        elif len(said) > 2000:
            kind, said = "wrong", f"{len(said)} characters: {said[:300]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind, said = "wrong", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    seconds, megabytes = time.perf_counter() - begin, (_peak() - before) / 1024
    if seconds > SECONDS or megabytes > reader.megabytes:
        kind, said = "wrong", f"{seconds:.1f} s, {megabytes:.0f} MB: {said}"
    if violations or (path.parent / MARK).exists():
        kind, said = "wrong", f"{violations or 'code ran'}: {said}"
        violations.clear()
    return {"kind": kind, "said": said[:600], "seconds": seconds, "megabytes": max(megabytes, 0.0)}


def run(reader: Reader, numbers: range, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The judgement of each case; a case whose process dies or hangs is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    content, at = reader.make(folder), numbers.start
    while at < numbers.stop:
        chunk = range(at, min(at + CHUNK, numbers.stop))
        source, sink = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(source)
            _child(reader, chunk, content, folder, sink)
        os.close(sink)
        for number, outcome in _collect(pid, source, chunk):
            yield number, outcome
            at = number + 1


def _collect(pid: int, source: int, chunk: range) -> Iterator[tuple[int, dict[str, Any]]]:
    number, text = chunk.start, b""
    while select.select([source], [], [], 6 * SECONDS)[0]:
        data = os.read(source, 1 << 16)
        if not data:
            break
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            yield number, json.loads(line)
            number += 1
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(source)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number < chunk.stop:
        said = "no answer" if code == -signal.SIGKILL else f"the process ended with {code}"
        yield number, {"kind": "wrong", "said": said, "seconds": 6 * SECONDS, "megabytes": 0.0}


def _child(reader: Reader, chunk: range, content: bytes, folder: Path, sink: int) -> None:
    """Reads the cases of a chunk and writes a line of JSON for each."""
    code = 1
    try:
        os.chdir(folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        violations: list[str] = []
        sys.addaudithook(_hook(folder, violations))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))
        path = folder / reader.path
        for number in chunk:
            path.unlink(missing_ok=True)
            path.write_bytes(mutated(reader, number, content))
            violations.clear()
            os.write(sink, json.dumps(judge(reader, path, violations)).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _hook(folder: Path, violations: list[str]) -> Callable[[str, tuple], None]:
    """An audit hook that notes started programs, connections, and files opened outside of the folder."""
    allowed = (str(folder), sys.prefix, sys.base_prefix, *MEASURED, "/dev/", "/usr/lib", "/sys/", "/etc/localtime")
    allowed += tuple(str(Path(name).resolve()) for name in sys.path if name)

    def hook(event: str, args: tuple) -> None:
        if event in FORBIDDEN:
            violations.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            name = os.fsdecode(args[0])
            path = name if name in MEASURED else os.path.realpath(name)
            if not path.startswith(allowed):
                violations.append(f"open {path:.200}")

    return hook


def _reset_peak() -> None:
    Path(MEASURED[0]).write_text("5")


def _peak() -> int:
    """Peak resident size, KiB, since it was reset."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(MEASURED[1]).read_text())
    assert found is not None
    return int(found[1])
