"""The communication of a step: docs/scaling.md holds what the command prints, and the model behaves."""

import pytest

from benchmarks import scaling
from fastkd.training import get_recipe


def test_the_page_holds_the_tables(tmp_path, monkeypatch, capsys):
    page = scaling.PAGE.read_text()
    text = scaling.tables()
    assert text in page
    monkeypatch.setattr(scaling, "PAGE", tmp_path / "scaling.md")
    monkeypatch.setattr(scaling, "tables", lambda seconds=scaling.SECONDS: {scaling.SECONDS: text}[seconds])
    scaling.PAGE.write_text(page.replace(text, f"{scaling.BEGIN}\nold\n{scaling.END}"))
    monkeypatch.setattr("sys.argv", ["scaling", "--write"])
    scaling.main()
    assert scaling.PAGE.read_text() == page and text in capsys.readouterr().out


def test_gradient_bytes_sent():
    student, own = scaling.trainable(get_recipe("coco-retinanet-lgd"))
    assert student == scaling.trainable(get_recipe("coco-retinanet-baseline"))[0] and own > 1e7
    assert scaling.ring_bytes(100, 1) == 0 and scaling.ring_bytes(100, 2) == 100 and scaling.ring_bytes(100, 4) == 150


@pytest.mark.parametrize("machine", [scaling.INFINIBAND, scaling.ETHERNET], ids=lambda machine: machine.name)
def test_scaling_efficiency_falls_with_gpus(machine):
    step, size = scaling.Step(0.05), 175_000_000
    found = [scaling.efficiency(size, gpus, machine, step) for gpus in scaling.GPUS]
    assert found[-1] > 0 and found[0] < 1 and found == sorted(found, reverse=True)
    slow = scaling.Step(0.05, overlap=0.0)
    for gpus in scaling.GPUS:
        whole = scaling.efficiency(size, gpus, machine, slow)
        assert whole < scaling.efficiency(size, gpus, machine, step)
        assert whole < scaling.efficiency(size // 2, gpus, machine, slow)
        exposed = 0.05 / whole - 0.05 - scaling.exchange_seconds(size, gpus, machine)
        assert exposed == pytest.approx(slow.agreements * 2 * slow.message * (gpus.bit_length() - 1))
