"""Requirements on the resources of compiled GPU kernels; the parser of the compiler's output."""

import importlib.machinery
import json
import re
import sys
import types
from pathlib import Path

import pytest
from sources import sources

import benchmarks.gpu
from benchmarks.gpu import report as gpu_report
from fastkd.ops._support import library

ROOT = Path(__file__).resolve().parents[2]
# Kernels without 16-byte accesses: they move few bytes, or bytes that are not contiguous.
NARROW = {
    r"merge_\w*kernel|sum_\w*kernel|normal_kernel": "a few numbers for each row or block",
    r"best_kernel|threshold_kernel|mark_kernel": "imitation_mask computes anchors and writes one byte a cell",
    r"pack_masks_kernel|count_cells_kernel": "masks, one bit or byte a cell, once for all channels",
    r"bias_kernel|pooled_kernel|weigh_kernel": "a few numbers for each channel and object",
    r"\w+_kernel<.*\b1>": "one element at a time, for channels or addresses that are no multiple of 16 bytes",
}
READ = "sm_90"  # the card whose instructions are read; all code is compiled from the same PTX

built = pytest.mark.skipif(not library.BUILT_IN_CUDA.exists(), reason="fastkd/_cuda.so is not built: `make cuda`")


@pytest.fixture(scope="module")
def kernels():
    found = gpu_report.read_kernels(library.BUILT_IN_CUDA, [READ])
    assert found
    return found


@built
def test_no_kernel_spills_or_needs_a_stack(kernels):
    assert [kernel for kernel in kernels if kernel.stack or kernel.spills] == []


@built
def test_shared_memory_fits_every_card(kernels):
    assert {kernel.card for kernel in kernels} <= set(gpu_report.SHARED_LIMITS)
    assert [kernel for kernel in kernels if kernel.shared > gpu_report.SHARED_LIMITS[kernel.card]] == []


@built
def test_static_arrays_beside_dynamic_memory_are_as_small_as_launches_reckon(kernels):
    """On sm_80: values for later cards include the kilobyte reserved by the system."""
    limit = int(re.search(r"kStaticShared = (\d+);", (ROOT / "csrc/common/device.h").read_text())[1])
    asking = re.compile("(pool|paint|forward_rows)_kernel")
    found = [kernel for kernel in kernels if kernel.card == "sm_80" and asking.match(kernel.name)]
    assert len(found) >= 40 and [kernel for kernel in found if kernel.shared > limit] == []


@built
def test_two_blocks_of_every_kernel_fit_a_multiprocessor(kernels):
    """Blocks of 256 threads, the maximum for kernels with many registers; with 64-bit offsets one block suffices."""
    assert [kernel for kernel in kernels if kernel.registers > 128 and "long" not in kernel.name] == []


@built
def test_kernels_that_move_pyramids_move_16_bytes_at_a_time(kernels):
    read = [kernel for kernel in kernels if kernel.card == READ]
    if not read:
        pytest.skip(f"fastkd/_cuda.so has no code for {READ}")
    narrow = re.compile("|".join(f"(?:{pattern})" for pattern in NARROW))
    assert [kernel for kernel in read if not kernel.wide and not narrow.match(kernel.name)] == []


@built
def test_every_kernel_is_in_the_report(kernels):
    files = sources("*.cu", "*.h")
    names = {name for path in files for name in re.findall(r"^FASTKD_KERNEL .*?void (\w+)\(", path.read_text(), re.M)}
    assert names and names - {re.match(r"\w+", kernel.name).group() for kernel in kernels} == set(), "run `make cuda`"


# the parser, on recorded output

PREFIX = "_ZN6fastkd53_GLOBAL__N__9f71e2c9_14_value_mimic_cu_4a00f767_11280"
FORWARD = PREFIX + "14forward_kernelIfiEEvNS0_6LevelsIT_EEPdl"
MERGE = PREFIX + "12merge_kernelIdEEvNS0_6LevelsIT_EEPKdlPNSt11conditionalIL_ZSt9is_same_vEdfE4typeES9_"
USAGE = f"""
Fatbin ptx code:
================
arch = sm_80
code version = [9,0]

Fatbin elf code:
================
arch = sm_90
compressed

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function {FORWARD}:
  REG:40 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:2232 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function {FORWARD}:
  REG:56 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:2232 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {MERGE}:
  REG:28 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:2232 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = f"""
\tcode for sm_90
\t.target\tsm_90

\t\tFunction : {FORWARD}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000ff00000000800 */
        /*0020*/                   HFMA2.MMA R0, -RZ, RZ, 0, 0 ;                   /* 0x00000000ff007435 */
        /*0e30*/                   LDG.E.128.CONSTANT R4, desc[UR18][R4.64] ;      /* 0x0000000a04047981 */
        /*1380*/                   LDG.E.CONSTANT R8, desc[UR10][R8.64] ;          /* 0x0000000a08087981 */
        /*1790*/               @P0 STG.E.128 desc[UR18][R2.64], R4 ;               /* 0x0000000402000986 */
        /*17a0*/                   LDS.128 R4, [R2] ;                              /* 0x0000000402000984 */
        /*17b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;           /* 0x0000000c0804723c */
        /*17c0*/              @!P1 STL [R1+0x8], R4 ;                              /* 0x0000080401009387 */
\t\tFunction : {MERGE}
        /*0000*/                   EXIT ;                                          /* 0x000000000000794d */
"""


def test_usage():
    assert gpu_report.parse_usage(USAGE) == {
        ("sm_90", FORWARD): (40, 0, 1280),
        ("sm_80", FORWARD): (56, 24, 0),
        ("sm_80", MERGE): (28, 0, 1280),
    }


def test_code():
    assert gpu_report.parse_code(CODE.splitlines()) == {
        ("sm_90", FORWARD): {"spills": 1, "wide": 2, "tensor_cores": 1},
        ("sm_90", MERGE): {"spills": 0, "wide": 0, "tensor_cores": 0},
    }


def test_names():
    assert gpu_report.readable([FORWARD, MERGE]) == [
        ("value_mimic", "forward_kernel<float, int>"),
        ("value_mimic", "merge_kernel<double>"),
    ]


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    def run(*command, given=None):
        if command[0] == "c++filt":
            return original(*command, given=given)
        return USAGE if "-res-usage" in command else CODE if "sm_90" in command else ""

    original = gpu_report.run
    monkeypatch.setattr(gpu_report, "run", run)
    library = tmp_path / "_cuda.so"
    library.touch()
    return library


def test_the_report_lists_registers_by_card(recorded, capsys, tmp_path):
    arguments = ["--library", str(recorded), "--cards", "sm_90", "--no-triton"]
    gpu_report.main([*arguments, "--json", str(tmp_path / "report.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["registers", "sm_80", "56", "28", "sm_90", "40"]
    assert lines[2].split() == ["56", "0", "24", "-", "-", "-", "value_mimic:", "forward_kernel<float,", "int>"]
    assert lines[5].split()[:6] == ["40", "1280", "0", "1", "2", "1"]
    assert len(json.loads((tmp_path / "report.json").read_text())) == 3


def test_triton_follows(recorded, monkeypatch, capsys):
    module = types.ModuleType("benchmarks.gpu.triton_report")
    module.main = lambda: print("Triton's table")
    module.__spec__ = importlib.machinery.ModuleSpec("benchmarks.gpu.triton_report", None)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.triton_report", module)
    monkeypatch.setattr(benchmarks.gpu, "triton_report", module, raising=False)
    gpu_report.main(["--library", str(recorded)])
    assert capsys.readouterr().out.endswith("Triton's table\n")


def test_without_a_library_the_report_says_how_to_build_it(tmp_path):
    with pytest.raises(SystemExit, match=r"none.so does not exist; `make cuda` builds it or says what is missing"):
        gpu_report.main(["--library", str(tmp_path / "none.so")])


def test_without_cuobjdump_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump must be there, got none; `pip install triton` brings it"):
        gpu_report.cuobjdump()
