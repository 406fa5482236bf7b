"""The report's pictures: order, colours, texts, smoothing, attention, feature maps."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.report import analysis, insides, mistakes, pictures, plots
from fastkd.report.analysis import (
    ImageDetections,
    Truth,
)
from fastkd.report.pictures import Mark
from fastkd.report.runs import Run


def test_images_from_the_easiest_to_the_hardest():
    class Source:
        class_names = ("thing",)

    one = np.array([[0.0, 0, 10, 10]])
    truths = {i: Truth(np.concatenate([one] * 4) + 20 * np.arange(4)[:, None], np.zeros(4, int)) for i in range(9)}
    truths[9] = Truth(np.zeros((0, 4)), np.zeros(0, int))
    found = {
        i: ImageDetections(t.boxes[: i // 2], np.full(min(i // 2, len(t.labels)), 0.9), t.labels[: i // 2])
        for i, t in truths.items()
    }
    verdicts = {i: analysis.judge(truths[i], found[i]) for i in truths}
    judged = mistakes.Judged(Run(Path("run"), "run"), found, verdicts, 0.5)
    images = mistakes.Images(Source(), truths, [judged])
    assert mistakes.choose_images(images, 3) == [8, 5, 1]
    assert mistakes.choose_images(images, 50) == [8, 6, 7, 4, 5, 2, 3, 0, 1]
    assert mistakes.choose_images(images, 0) == []


def test_drawn_colours_survive_and_texts_do_not_overlap():
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    marks = [
        Mark((10, 10, 40, 40), pictures.RIGHT_COLOUR, "first"),
        Mark((12, 12, 42, 42), pictures.WRONG_COLOUR, "second"),
        Mark((80, 50, 120, 90), pictures.MISSED_COLOUR, dashed=True),
    ]
    picture = Image.open(io.BytesIO(pictures.annotated(noise, marks))).convert("RGB")
    assert picture.size == (3 * 128, 3 * 96)
    pixels = np.asarray(picture).reshape(-1, 3)
    for mark in marks:
        colour = [int(mark.colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 50
    taken = []
    sheet = Image.open(io.BytesIO(pictures.annotated(noise, []))).copy()
    for place in range(6):
        frame = (20.0 + place, 60.0, 60.0, 100.0)
        pictures._draw_tag(sheet, frame, [frame], "label", pictures.RIGHT_COLOUR, taken)
    overlaps = [pictures._overlap(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert len(taken) >= 4 and max(overlaps) == 0.0
    large = np.zeros((1200, 900, 3), np.uint8)
    assert Image.open(io.BytesIO(pictures.annotated(large, marks))).size == (270, 360)
    assert max(Image.open(io.BytesIO(pictures.crop(large, marks, (0, 0, 900, 900)))).size) == 180


def test_smoothing():
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(20)]
    assert plots.smooth(values, 5) == pytest.approx(expected)
    assert plots.smooth(values, 1) is values


def test_attention_becomes_a_density_over_the_image():
    raw = [torch.rand(3, 8, 6), torch.rand(3, 4, 3)]
    total = sum(level.sum(dim=(1, 2)) for level in raw)
    levels = [level / total[:, None, None] for level in raw]
    density, shares = insides.attention_over_image(levels, (32, 24))
    assert density.shape == (3, 32, 24)
    assert density.sum(axis=(1, 2)) == pytest.approx([1.0] * 3, rel=0.02)
    for head, (level, share) in enumerate(shares):
        assert share == pytest.approx(float(levels[level][head].sum()))
        assert share >= 0.5
    spot = torch.zeros(1, 8, 6)
    spot[0, 6, 1] = 1.0
    density, _ = insides.attention_over_image([spot, torch.zeros(1, 4, 3)], (32, 24))
    y, x = np.unravel_index(density[0].argmax(), (32, 24))
    assert 24 <= y < 28 and 4 <= x < 8


def test_feature_maps():
    student, instructive = torch.randn(5, 6, 7), torch.randn(5, 6, 7)
    adapted = 3.0 * instructive + 2.0  # the same after normalising
    maps = insides.feature_maps(student, adapted, instructive)
    flat = student.flatten(1).double()
    normalised = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert maps[0].reshape(-1) == pytest.approx((normalised**2).mean(0).sqrt().numpy(), rel=1e-6)
    assert maps[1] == pytest.approx(maps[2], rel=1e-3) and maps[3] == pytest.approx(maps[4], rel=1e-3, abs=1e-3)
    covariance = np.cov(np.asarray(normalised_of(instructive)))
    assert maps[4].var() == pytest.approx(np.linalg.eigvalsh(covariance)[-1], rel=0.05)


def normalised_of(maps):
    flat = maps.flatten(1).double()
    return (flat - flat.mean(1, keepdim=True)) / flat.std(1, unbiased=False, keepdim=True)
