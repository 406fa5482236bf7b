"""The emulation under AddressSanitizer finds what it cannot see by itself: a thread's own arrays, plain pointers.

`make sanitize` runs this, and all tests of the .cu sources, on a build of its own (FASTKD_SIMT).
"""

import os
import subprocess
import sys

import pytest
import simt

SANITIZED = "FASTKD_SIMT" in os.environ
BUGS = simt.module.planted_bugs(for_sanitizer=True)
RUN = "import sys, simt; simt.module.run_planted(sys.argv[1], sys.argv[2] == 'bug'); print('survived')"


def test_there_are_bugs_of_every_kind():
    assert set(BUGS.values()) == {"stack-buffer-overflow", "heap-buffer-overflow", "stack-use-after-scope"}


@pytest.mark.skipif(not SANITIZED, reason="needs the emulation of `make sanitize`")
@pytest.mark.parametrize("name", sorted(BUGS))
def test_the_sanitizer_reports(name):
    for form in ("mended", "bug"):
        run = subprocess.run([sys.executable, "-c", RUN, name, form], capture_output=True, text=True, cwd=simt.TESTS)
        if form == "mended":
            assert run.returncode == 0 and "survived" in run.stdout, run.stderr[-2000:]
        else:
            assert run.returncode != 0 and f"AddressSanitizer: {BUGS[name]}" in run.stderr, run.stderr[-2000:]
