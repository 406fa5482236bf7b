"""docs/results/gpu-kernels.md: rows of kernels, labelled predictions."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import kernels_page
from benchmarks.gpu import traffic as gpu_traffic
from benchmarks.gpu.report import Kernel
from benchmarks.gpu.triton_report import Case, Row

KERNELS = [
    Kernel("value_mimic", "forward_kernel<float, int>", "sm_80", 40, 1280, 0, 0, 8, 0),
    Kernel("value_mimic", "forward_kernel<double, int>", "sm_80", 56, 1280, 0, 0, 4, 0),
    Kernel("value_mimic", "merge_kernel<float>", "sm_80", 28, 256, 8, 2, 0, 0),
]
ROWS = [Row(Case("forward"), 80, 176, 0, 69632, {"HMMA": 144}, 128)]


def test_instantiations_are_one_row():
    first, second = kernels_page.cuda_rows(KERNELS)[2:]
    assert first == "| value_mimic | forward_kernel | sm_80 | 2 | 40-56 | 1280 | 0 | 0 | 4-8 | 0 |"
    assert second == "| value_mimic | merge_kernel | sm_80 | 1 | 28 | 256 | 8 | 2 | 0 | 0 |"


def test_the_page_says_what_is_predicted():
    page = kernels_page.page(KERNELS, ROWS)
    assert "Nothing here ran on a GPU" in page and "Kernels with a spill or a stack: 1." in page
    assert "| forward absorbed channels-last bfloat16 N=42 | sm_80 | 176 | 0 | 68.0 | 144 HMMA | 128 |" in page
    launches = page[page.index("launch by launch\n") :]
    assert launches.count("PREDICTED, ms") == 3
    for name in gpu_traffic.MODELS:
        assert f"| {name} | contiguous | " in launches


def test_without_a_library_it_says_how_to_build_one(tmp_path):
    with pytest.raises(SystemExit, match=r"none.so does not exist; `make cuda` builds it or says what is missing"):
        kernels_page.main(["--library", str(tmp_path / "none.so"), "--out", str(tmp_path / "page.md")])
