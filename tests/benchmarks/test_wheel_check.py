"""The check at the end of `make wheel`."""

import zipfile

import pytest

from benchmarks import wheel

ELF = "ELF file    1: _cuda.1.sm_100.cubin\nELF file    2: _cuda.2.sm_90.cubin\nELF file    3: _cuda.3.sm_80.cubin\n"
PTX = "PTX file    1: _cuda.1.sm_80.ptx\n"


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A wheel of empty files, and the output of cuobjdump for it."""
    listed = {"--list-elf": ELF, "--list-ptx": PTX}
    monkeypatch.setattr(wheel, "run", lambda tool, option, library: listed[option])
    monkeypatch.setattr(wheel, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(wheel, "LOAD", "import fastkd; print(fastkd.__file__, '|', 'sm_80')")

    def make(*names):
        path = tmp_path / "fastkd-0-py310-none-linux_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(f"fastkd/{name}", "")
        return path

    return make, listed


def test_a_good_wheel(made, capsys):
    make, _ = made
    assert wheel.main([str(make("__init__.py", "_cpu.so", "_cuda.so"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "machine code: sm_100 sm_80 sm_90; PTX: sm_80" in lines and lines[-1] == "loads without a GPU: sm_80"


def test_what_is_wrong_is_said(made, monkeypatch, capsys):
    make, listed = made
    assert wheel.check(make("__init__.py", "_cpu.so"))[1] == ["fastkd/_cuda.so is missing"]
    whole = make("__init__.py", "_cpu.so", "_cuda.so")
    listed["--list-ptx"] = ""
    assert wheel.main([str(whole)]) == 1
    assert "WRONG: machine code for sm_100 sm_80 sm_90 and PTX must be there" in capsys.readouterr().out
    listed["--list-ptx"] = PTX
    monkeypatch.setattr(wheel, "LIMIT", 10)
    assert wheel.check(whole)[1] == ["the wheel must be under 0 MB"]
    monkeypatch.setattr(wheel, "LIMIT", 10**6)
    monkeypatch.setattr(wheel, "LOAD", "raise SystemExit('no library')")
    assert wheel.check(whole)[1] == ["the libraries do not load without a GPU: no library\n"]
