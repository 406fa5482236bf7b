"""The sanitizer build reports every bug planted in tests/planted.

`make sanitize` runs this on a separate build with torch (FASTKD_PLANTED); the plain test suite builds stand-alone
programs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sources import sources

from fastkd.ops._support import library

ROOT = Path(__file__).resolve().parents[2]
BUILD = os.environ.get("FASTKD_PLANTED")
COMPILER = os.environ.get("CXX", "c++")
SANITIZERS = "address,undefined,float-cast-overflow"
BUGS = {
    "read-past-the-end": r"insufficient space|heap-buffer-overflow",
    "read-before-the-start": "heap-buffer-overflow",
    "vector-read-past-the-end": "heap-buffer-overflow",
    "write-past-the-end": r"insufficient space|heap-buffer-overflow",
    "vector-write-past-the-end": "heap-buffer-overflow",
    "half-write-past-the-end": "heap-buffer-overflow",
    "stack-overflow": "stack-buffer-overflow",
    "global-overflow": "global-buffer-overflow",
    "use-after-scope": "stack-use-after-scope",
    "use-after-free": "heap-use-after-free",
    "double-free": "double-free",
    "signed-overflow": "signed integer overflow",
    "misaligned": "misaligned address",
    "misaligned-vector": "misaligned address .* 'const FloatVector'",
    "null": "null pointer",
    "bool": "not a valid value for type 'bool'",
    "enum": "not a valid value for type 'Layout'",
    "float-to-int": "outside the range of representable values of type 'int'",
    "shift": "shift exponent 33 is too large",
    "division-by-zero": "division by zero",
}
THROUGH_TORCH = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.ops.fastkd_planted.{call}
print("survived")
"""


def runtime(name: str) -> str | None:
    """Path of a runtime library of the compiler, or None."""
    if shutil.which(COMPILER) is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


pytestmark = pytest.mark.skipif(
    BUILD is None and (runtime("libasan.so") is None or runtime("libubsan.so") is None),
    reason=f"{COMPILER} has no sanitizers",
)


def capabilities():
    names = ["generic", "avx2", "avx512", "avx512_bf16"]
    return range(min(names.index(library.cpu_capability() or "generic"), 2) + 1)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder with planted_0 (generic), planted_1 (AVX2) and planted_2 (AVX-512), as far as this CPU runs them."""
    if BUILD is not None:
        return Path(BUILD)
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    folder = tmp_path_factory.mktemp("planted")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DFASTKD_SANITIZE={SANITIZERS}"]
    targets = [f"planted_{number}" for number in capabilities()]
    for command in (
        [*configure, f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={shutil.which(COMPILER)}"],
        [cmake, "--build", str(folder), "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(command, **environment):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("number", capabilities())
def test_every_planted_bug_is_found(programs, number):
    program = programs / f"planted_{number}"
    survivor = run([program, "none"])
    assert survivor.returncode == 0 and survivor.stdout.startswith("survived"), survivor.stderr
    for bug, report in BUGS.items():
        found = run([program, bug])
        assert found.returncode != 0 and re.search(report, found.stderr), f"{bug}: {found.stdout}{found.stderr[:2000]}"


def test_kernels_use_nothing_that_the_sanitizers_cannot_see():
    """GCC's AddressSanitizer does not check masked and gather intrinsics; kernels copy their tails instead."""
    blind = re.compile(
        r"_mm\d*_(maskz?_(loadu|load|storeu|store|compress|expand)|maskload|maskstore|\w*gather|\w*scatter)"
    )
    assert blind.search("_mm512_maskz_loadu_ps(mask, row)") and blind.search("_mm256_maskload_ps(row, mask)")
    for source in sources("*.cpp", "*.h"):
        assert not blind.search(source.read_text(encoding="utf-8")), source.name


@pytest.mark.skipif(BUILD is None, reason="needs the library of `make sanitize`")
@pytest.mark.parametrize(
    "call, report",
    [
        ("read(torch.zeros(7), 6)", None),
        ("read(torch.zeros(7), 7)", "READ of size 4"),
        ("read(torch.zeros(1, 3, 9, 11)[..., :5], 297)", "READ of size 4"),
        ("write(torch.zeros(7), 7)", "WRITE of size 4"),
        ("write(torch.zeros(7), -1)", "WRITE of size 4"),
    ],
)
def test_bugs_in_torchs_memory_are_found(call, report):
    libraries = [runtime("libasan.so"), runtime("libstdc++.so.6")]
    script = [sys.executable, "-c", THROUGH_TORCH.format(call=call), str(Path(BUILD) / "_planted.so")]
    found = run(script, LD_PRELOAD=" ".join(filter(None, libraries)))
    if report is None:
        assert found.returncode == 0 and "survived" in found.stdout, found.stderr
    else:
        assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr and report in found.stderr, found.stderr
