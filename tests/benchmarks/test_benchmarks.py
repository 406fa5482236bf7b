"""The benchmark of the ops: its plain forms against the references, a tiny run from end to end, its arithmetic."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import memory
from benchmarks.ops import __main__ as bench
from benchmarks.ops import profile as ops_profile
from benchmarks.ops import results
from benchmarks.ops.draws import QUICK, Draw, Shape
from benchmarks.ops.limits import LIMITS, Pass, floor
from benchmarks.ops.rows import BY_NAME, ROWS, Targets
from benchmarks.step.steps import Step, assert_same
from fastkd import ops
from fastkd.ops._support import library

CPU = torch.device("cpu")
SHAPES = [replace(QUICK, images=2), replace(QUICK, images=3, height=100, width=140, strides=(8, 32), boxes=5, real=3)]


@pytest.fixture
def references():
    """Ops without kernels."""
    with ops.use_backend("reference"):
        yield


@pytest.mark.sampled
@pytest.mark.parametrize("row", {row.build: row for row in ROWS}.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("shape", SHAPES, ids=["exact", "ragged"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_plain_forms_equal_the_reference(references, row, shape, channels_last):
    case = row.build(Draw(shape, torch.float64, channels_last, CPU))
    expected = Step(case.ours, case.arguments)
    found = expected()
    assert all(value.isfinite().all() for value in found) and any(value.any() for value in found)
    for name, form in case.plain.items():
        step = Step(form, case.arguments)
        assert_same(step, expected, torch.float64)
        assert len(step()) == len(tree_leaves(case.ours(*case.arguments))) + len(step.wanted) * bool(step.cotangents), (
            name
        )
    assert case.compiled in case.plain


def test_a_wrong_result_is_refused():
    case = BY_NAME["box_paint"].build(Draw(QUICK, torch.float32, False, CPU))
    right = Step(case.ours, case.arguments)
    assert_same(right, right, torch.float32)
    for wrong in (
        lambda e: [level * 1.01 for level in case.ours(e)],
        lambda e: [level[:, :, 1:] for level in case.ours(e)],
        lambda e: [level + (e - e.detach()).sum() for level in case.ours(e)],  # the gradient alone is wrong
        lambda e: [level * float("nan") for level in case.ours(e)],
        lambda e: case.ours(e)[1:],
    ):
        with pytest.raises((AssertionError, ValueError)):
            assert_same(Step(wrong, case.arguments), right, torch.float32)


def test_memory_counts_what_is_alive_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(3000, dtype=torch.float32)
        del first
        return torch.empty(500, dtype=torch.float32), second

    measured = memory.measure(call, CPU)
    assert 16000 <= measured.peak < 16000 + 1000 and 12000 <= measured.largest < 12000 + 500


def test_the_shape_is_the_published_one():
    assert Shape().cells == 20267 and Shape().level_sizes[0] == (100, 152)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A tiny run of all rows; ours and plain."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench.main(["--quick", "--threads", "1", "--parts", "--out", str(folder)]) == 0, bench.LOG.read_text()
    return folder, json.loads((folder / "ops.json").read_text())


def test_every_row_is_measured(quick_run):
    folder, saved = quick_run
    assert list(saved["rows"]) == [row.name for row in ROWS]
    for row in saved["rows"].values():
        assert row["times_plain"] > 0 and row["sides"]["ours"]["memory"]["peak"] > 0
    assert set(saved["limits"]) == set(LIMITS) and min(saved["limits"].values()) > 0
    text = (folder / "ops.md").read_text()
    assert all(f"| {row.name}" in text for row in ROWS) and (folder / "ops-times.png").is_file()
    assert saved["commit"] in text and saved["command"] in text


def test_quote(quick_run, capsys):
    folder, _ = quick_run
    assert bench.main(["--quote", str(folder / "ops.json")]) == 0
    text = capsys.readouterr().out
    assert "| instance_norm_mse |" in text and "| value_mimic |" not in text and "targets met" in text


@pytest.mark.long
def test_all_parts_of_one_row(tmp_path):
    command = ["--quick", "--threads", "1", "--rows", "box_pool, 7 boxes", "--out", str(tmp_path)]
    assert bench.main(command) == 0, bench.LOG.read_text()
    saved = json.loads((tmp_path / "ops.json").read_text())
    row = saved["rows"]["box_pool, 7 boxes"]
    assert set(row["sides"]) == {
        "ours",
        "plain: masks",
        "plain: slices",
        "compiled",
        "channels-last",
        "bfloat16",
        "one thread",
        "floor",
    }
    assert set(saved["growth"]) == {"images", "cells", "boxes"}
    assert (tmp_path / "ops-growth.png").is_file()


def test_comparison_with_a_saved_run(quick_run, tmp_path, monkeypatch, capsys):
    _, saved = quick_run
    slower = copy.deepcopy(saved)
    slower["rows"]["masked_mse"]["sides"]["ours"]["ms"] *= 1.3
    monkeypatch.setattr(bench, "collect", lambda chosen: (slower, True))
    before = tmp_path / "before.json"
    before.write_text(json.dumps(saved))
    command = ["--quick", "--compare", str(before), "--out", str(tmp_path)]
    assert bench.main([*command, "--threshold", "1.4"]) == 0
    assert bench.main([*command, "--threshold", "1.2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "SLOWER" in line and "| masked_mse |" in line and "| 1.30 |" in line]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.json"]  # the saved results stay
    slower["rows"]["masked_mse"]["shape"] = {}
    with pytest.raises(ValueError, match=r"compare: masked_mse must have the saved run's shape"):
        bench.main(command)


def entry(ms, peak, returned, elements=0, multiply_adds=0):
    work = {"multiply_adds": multiply_adds, "bytes": 4 * elements, "read": 3 * elements, "written": elements}
    return {"ms": ms, "memory": {"peak": peak}, "returned": returned, "work": work}


def test_conclusions():
    sides = {
        "ours": entry(2.0, 110, 100, elements=10**7),
        "plain: slow": entry(50.0, 900, 100),
        "plain: fast": entry(20.0, 600, 100),
        "compiled": entry(8.0, 300, 100),
    }
    limits = {"copy": 40.0, "multiply-adds": 100.0}
    found = results.conclusions(sides, Targets(10, 5, 0.4, 1), limits, "multiply-adds")
    assert found["plain_form"] == "fast" and found["times_plain"] == 10 and found["times_compiled"] == 4
    assert found["share"] == pytest.approx(0.5) and found["limit"] == "copy"  # 40 MB in 2 ms = 20 GB/s
    assert found["met"] == {"times_plain": True, "times_compiled": False, "share": True, "memory": False}
    sides["ours"] = entry(2.0, 102, 100, multiply_adds=10**8)
    found = results.conclusions(sides, Targets(11, None, 0.4, 1), limits, "multiply-adds")
    assert found["share"] == pytest.approx(1.0) and found["met"] == {
        "times_plain": False,
        "share": True,
        "memory": True,
    }
    sides["ours"] = entry(2.0, 125, 100)
    for fraction, met in ((1 / 10, True), (1 / 21, False)):  # 25 of plain's 500
        targets = Targets(memory=fraction / 2 if met is False else fraction, of_plain=True)
        assert results.conclusions(sides, targets, limits, "multiply-adds")["met"] == {"memory": met}


def test_floor_bounds_the_ratios():
    sides = {"ours": entry(2.0, 110, 100), "plain: one": entry(12.0, 600, 100), "compiled": entry(8.0, 300, 100)}
    sides["floor"] = entry(1.0, 0, 0, elements=2**20)
    row = results.conclusions(sides, Targets(15, 7), {}, "multiply-adds")
    assert row["at_floor"] == {"times_plain": 12, "times_compiled": 8}
    assert results.out_of_reach(row, "times_plain") and not results.out_of_reach(row, "times_compiled")
    table = results.bounds_table({"instance_norm_mse": row | {"sides": sides}})
    assert table[2:] == ["| instance_norm_mse | 3.0 | 1.0 | 1.00 | 2.0 | 12.0 (15.0) out of reach | 8.0 (7.0) |"]
    assert "floor" not in results.conclusions({"ours": sides["ours"]}, Targets(), {}, "multiply-adds")


def test_what_missed_ratios_ask_for():
    sides = {"ours": entry(2.0, 110, 100, elements=10**7), "plain: one": entry(12.0, 600, 100)}
    sides["compiled"] = entry(8.0, 300, 100)
    limits = {"copy": 40.0}
    found = results.conclusions(sides, Targets(15, 4), limits, "multiply-adds")
    table = results.missed_table({"box_pool, 7 boxes": found | {"sides": sides}}, limits)  # 40 MB in 0.8 ms
    assert table[2:] == ["| box_pool, 7 boxes | 15 x plain | 0.80 | 2.00 | 50 GB/s | 125% of copy |"]


def test_floor_writes_what_it_must():
    torch.set_num_threads(1)
    call = floor((Pass((5000, 300)), Pass((5000,), 4000)), torch.float32)
    first, second = call()
    assert first is None and second.shape == (4000,) and (second.view(torch.uint8) == 1).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_cells_in_cache_lines(channels_last):
    draw = Draw(replace(QUICK, images=2), torch.float32, channels_last, CPU)
    masks = [torch.zeros(2, *size, dtype=torch.bool) for size in draw.shape.level_sizes]
    masks[0][1, 0, :3] = True
    assert draw.in_lines(masks) == (3 if channels_last else 16) * draw.shape.channels


def test_exponent_of_growth():
    assert results.exponent([[1, 3.0], [2, 6.0], [4, 12.0]]) == pytest.approx(1)
    assert results.exponent([[1, 3.0], [2, 12.0], [4, 48.0]]) == pytest.approx(2)


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--rows", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    assert str(bench.parse([]).out) == "docs/results" and str(bench.parse(["--rows", "box_paint"]).out) == "build/bench"


@pytest.mark.skipif(not library.has_kernel("value_mimic", "cpu"), reason="no compiled kernels")
def test_the_profile_names_every_kernel_of_a_step(capsys):
    ops_profile.main(["--quick", "--rounds", "1", "--rows", "box_paint_conv3x3", "value_mimic"])
    lines = capsys.readouterr().out.splitlines()
    kernels = [f"of it {name}" for name in ("box_paint_conv3x3", "box_paint_conv3x3_backward", "conv3x3_taps")]
    for part in (*kernels, "forward", "backward", "**whole step**", "its bytes alone"):
        found = [line.split("|") for line in lines if line.startswith(f"| {part} |")]
        assert len(found) == (1 if part in kernels else 2)
        assert all(float(cells[place]) > 0 for cells in found for place in (2, 4))
