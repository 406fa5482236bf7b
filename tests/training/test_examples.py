"""The examples run as they are, on little data and for few steps."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import make_tiny_data

import fastkd
from fastkd.cli import run as run_command
from fastkd.data import CocoDataset
from fastkd.training.run.logging import read_log

EXAMPLES = Path(fastkd.__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name; it is forgotten after the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    imported = []

    def load(name):
        imported.append(name)
        return __import__(name)

    yield load
    for name in imported:
        sys.modules.pop(name, None)


def tiny(recipe):
    """A recipe that trains two small images a step and measures no cost."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, short_sides=(64,), val_short_side=64, workers=0),
        schedule=dataclasses.replace(recipe.schedule, batch_size=2),
        runtime=dataclasses.replace(recipe.runtime, ledger_pairs=0, precision="float32"),
    )


def test_own_method(example, tmp_path, tmp_path_factory, monkeypatch):
    own_method = example("own_method")
    train = own_method.train
    monkeypatch.setattr(own_method, "train", lambda recipe, run_dir: train(tiny(recipe), run_dir))
    result = own_method.main(make_tiny_data(tmp_path_factory), tmp_path / "run", steps=2)
    assert result.exit_code == 0 and result.metrics["steps"] == 2
    assert json.loads((tmp_path / "run/recipe.json").read_text())["method"] == {
        "kind": "cosine",
        "weight": 2.0,
        "final_fraction": 0.2,
    }
    record = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert 0 < record["losses"]["cosine_distill"] < 4
    assert load_file(tmp_path / "run/method.safetensors").keys() == {"adapter.weight", "adapter.bias"}
    assert len((EXAMPLES / "own_method.py").read_text().splitlines()) <= 60


def test_own_detector(example, tmp_path, tmp_path_factory, monkeypatch):
    """Teacher, LGD and ICD with a detector of one's own; then the commands, which import it on --detector alone."""
    own_detector = example("own_detector")
    whole = own_detector.recipe_of
    monkeypatch.setattr(own_detector, "recipe_of", lambda *arguments: tiny(whole(*arguments)))
    data, run = make_tiny_data(tmp_path_factory), tmp_path / "run"
    results = own_detector.main(data, run, steps=2)
    assert [result.status for result in results] == ["finished"] * 3
    name = "own_detector:TinyDetector"
    assert json.loads((run / "icd/recipe.json").read_text())["detector"]["custom"] == name
    losses = {
        method: next(record["losses"] for record in read_log(run / method) if "losses" in record)
        for method in ("lgd", "icd")
    }
    assert losses["lgd"].keys() >= {"classification", "box", "instructive_box", "lgd_distill"}
    assert losses["icd"].keys() >= {"classification", "box", "icd_distill"} and losses["icd"]["icd_distill"] > 0
    assert results[2].metrics["inherited"].startswith("4 of 4 tensors")

    monkeypatch.setattr("fastkd.detectors.own._used", {})  # as in another process
    again = ["train", str(run / "lgd/recipe.json"), "--run-dir", str(run / "lgd"), "--resume", "--device", "cpu"]
    on_data = ["--annotations", str(data / "annotations/val.json"), "--images", str(data / "val"), "--device", "cpu"]
    evaluate = ["evaluate", str(run / "icd"), *on_data, "--out", str(tmp_path / "metrics.json")]
    export = ["export", str(run / "icd"), "--out", str(tmp_path / "export")]
    with pytest.raises(ValueError, match=f"{name} must be imported by the user.*pass --detector {name}"):
        run_command([*evaluate])
    run_command([*evaluate, "--detector", name])
    measured = json.loads((tmp_path / "metrics.json").read_text())["bbox"]
    assert measured["images"] == results[2].metrics["bbox"]["images"]
    assert measured["AP"] == pytest.approx(results[2].metrics["bbox"]["AP"], abs=0.01)
    run_command([*again, "--detector", name])  # the same recipe, finished: it would raise otherwise
    with pytest.raises(ValueError, match=f"must be one of fastkd's, got {name}; pass --no-onnx"):
        run_command([*export, "--detector", name])
    run_command([*export, "--detector", name, "--no-onnx"])
    assert json.loads((tmp_path / "export/model.json").read_text())["levels"][2]["stride"] == 32
    page = tmp_path / "report.html"
    run_command(["report", str(run / "icd"), "--out", str(page), "--images", "1", "--detector", name])
    assert "Where the teacher looks (ICD)" in page.read_text() and "nothing to show" not in page.read_text()


def test_real_photographs(example, tmp_path, capsys):
    """Two images in the layout of BCCD_Dataset become a data set that opens without complaint."""
    real = example("real_photographs")
    voc = tmp_path / "BCCD_Dataset/BCCD"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (voc / folder).mkdir(parents=True)
    for name, list_name in (("one", "trainval"), ("two", "test")):
        (voc / f"ImageSets/Main/{list_name}.txt").write_text(f"{name}\n")
        Image.new("RGB", (64, 48)).save(voc / f"JPEGImages/{name}.jpg")
        corners = "<xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>30</ymax>"
        (voc / f"Annotations/{name}.xml").write_text(
            "<annotation><size><width>64</width><height>48</height></size>"
            f"<object><name>WBC</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    real.main(tmp_path / "BCCD_Dataset", tmp_path / "bccd")
    assert "train: 1 images, 1 objects" in capsys.readouterr().out
    for split in ("train", "val"):
        data = CocoDataset(tmp_path / f"bccd/annotations/{split}.json", tmp_path / "bccd" / split, strict=True)
        assert data.class_names[data.targets(0)[1][0]] == "WBC" and data.targets(0)[0].tolist() == [[0, 10, 20, 30]]
    with pytest.raises(SystemExit, match="TARGET must be new"):
        real.main(tmp_path / "BCCD_Dataset", tmp_path / "bccd")
    with pytest.raises(SystemExit, match="SOURCE must be a clone of BCCD_Dataset"):
        real.main(tmp_path, tmp_path / "other")
