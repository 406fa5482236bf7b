"""Tiles: their places, the rule of the visible part, masks, the command."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from fastkd.cli import main
from fastkd.data import CocoDataset, generate_scenes
from fastkd.data import tiles as tiling_module
from fastkd.data.tiles import Tiling, write_tiles


def test_starts_cover_the_length_with_the_overlap():
    tiling = Tiling(side=100, overlap=20)
    assert tiling.starts(80) == tiling.starts(100) == [0]
    assert tiling.starts(180) == [0, 80] and tiling.starts(181) == [0, 40, 81]
    for length in range(101, 900, 7):
        starts = tiling.starts(length)
        assert starts[0] == 0 and starts[-1] == length - 100
        assert all(before + 100 - after >= 20 for before, after in itertools.pairwise(starts))


def write_image(root):
    """One image of 180 x 100 pixels: two tiles of 100, which share columns 80 .. 99."""
    (root / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 180, 3), np.uint8)
    Image.fromarray(pixels).save(root / "images/a.png")
    boxes = [
        ([10, 10, 20, 20], 0),  # in the first tile alone
        ([85, 10, 10, 10], 0),  # whole in both
        ([70, 50, 40, 10], 0),  # three quarters in each
        ([90, 70, 40, 10], 0),  # a quarter in the first: to ignore there
        ([99.5, 90, 40, 5], 0),  # half a pixel in the first: dropped there
        ([0, 0, 100, 4], 1),  # a crowd region stays one
    ]
    entries = [
        {"id": n, "image_id": 7, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for n, (box, crowd) in enumerate(boxes)
    ]
    images = [{"id": 7, "file_name": "a.png", "width": 180, "height": 100}]
    content = {"images": images, "annotations": entries, "categories": [{"id": 3, "name": "ship"}]}
    (root / "all.json").write_text(json.dumps(content))
    return pixels


def test_boxes_are_cut_and_ignored_by_the_visible_part(tmp_path):
    pixels = write_image(tmp_path)
    counts = write_tiles(tmp_path / "all.json", tmp_path / "images", tmp_path / "out", "val", Tiling(100, 20, 0.5))
    assert str(counts) == "2 tiles of 1 images, with 7 objects and 3 parts of objects to ignore"
    data = CocoDataset(tmp_path / "out/annotations/val.json", tmp_path / "out/val", strict=True)
    assert data.class_names == ["ship"] and data.category_ids == [3]
    first, second = data.load(0), data.load(1)
    assert np.array_equal(first.image, pixels[:, :100]) and np.array_equal(second.image, pixels[:, 80:])
    assert first.boxes.tolist() == [[10, 10, 30, 30], [85, 10, 95, 20], [70, 50, 100, 60]]
    assert first.ignore_boxes.tolist() == [[90, 70, 100, 80], [0, 0, 100, 4]]
    assert second.boxes.tolist() == [[5, 10, 15, 20], [0, 50, 30, 60], [10, 70, 50, 80], [19.5, 90, 59.5, 95]]
    assert second.ignore_boxes.tolist() == [[0, 0, 20, 4]]


def test_masks_are_cut_along(tmp_path):
    """Tiles of the generated scenes: every mask is the crop of its original."""
    root = generate_scenes(tmp_path / "scenes", train=4, val=1, seed=1, processes=1)
    source = CocoDataset(root / "annotations/train.json", root / "train", with_masks=True)
    tiling = Tiling(side=64, overlap=16, min_visible=0.25)
    write_tiles(root / "annotations/train.json", root / "train", tmp_path / "tiles", "train", tiling, with_masks=True)
    tiles = CocoDataset(
        tmp_path / "tiles/annotations/train.json", tmp_path / "tiles/train", with_masks=True, strict=True
    )
    number = compared = 0
    for index in range(len(source)):
        width, height = (int(v) for v in source.sizes[index])
        masks = source.masks(index)
        for x, y, right, bottom in tiling.windows(width, height):
            crops = masks[:, y:bottom, x:right]
            wanted = [crop for crop, mask in zip(crops, masks) if crop.sum() >= 0.25 * mask.sum()]
            found = tiles.masks(number)
            assert all(any(np.array_equal(mask, crop) for crop in wanted) for mask in found)
            compared += len(found)
            number += 1
    assert number == len(tiles) and compared > 10


def test_errors(tmp_path):
    write_image(tmp_path)
    for settings, message in (
        ({"side": 0}, "side must be at least 1"),
        ({"side": 10, "overlap": 10}, r"overlap must be in \[0, side = 10\), got 10"),
        ({"min_visible": 0}, r"min_visible must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Tiling(**settings)
    arguments = tmp_path / "all.json", tmp_path / "images", tmp_path / "out", "train", Tiling()
    write_tiles(*arguments)
    with pytest.raises(FileExistsError, match="root must hold no files of train"):
        write_tiles(*arguments)


def test_the_command(tmp_path, capsys, shown):
    write_image(tmp_path)
    places = [str(tmp_path / "all.json"), str(tmp_path / "images"), "--root", str(tmp_path / "out")]
    assert main(["data", "tile", *places, "--split", "val", "--side", "100", "--overlap", "20"]) == 0
    assert "2 tiles of 1 images, with 7 objects" in " ".join(capsys.readouterr().err.split())
    assert len(list((tmp_path / "out/val").iterdir())) == 2 and shown["cut"] == ("images", 1, 1)


def test_an_interruption_leaves_no_tiles(tmp_path, monkeypatch):
    write_image(tmp_path)
    arguments = tmp_path / "all.json", tmp_path / "images", tmp_path / "out", "train", Tiling()

    def stop(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(tiling_module, "write_json", stop)
        write_tiles(*arguments)
    assert write_tiles(*arguments).images == 1
