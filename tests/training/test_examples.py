"""The examples run as they are, on little data and for few steps."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import make_tiny_data

import fastkd

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
    whole = own_method.recipe_of
    monkeypatch.setattr(own_method, "recipe_of", lambda *arguments: tiny(whole(*arguments)))
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
    assert len((EXAMPLES / "own_method.py").read_text().splitlines()) <= 80
