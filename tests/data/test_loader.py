"""Loaders: batches as a pure function of (seed, step, rank), geometry, bad images."""

import dataclasses
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastkd.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    BadImageError,
    CocoDataset,
    build_eval_loader,
    build_train_loader,
)
from fastkd.data.batch_loader import _start_worker
from fastkd.data.loader import epoch_batches
from fastkd.data.transforms import resized_size
from fastkd.types import Batch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = coco_files.write_folder(tmp_path_factory.mktemp("many"), coco_files.many_images(45))
    return CocoDataset(*folder, strict=True)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = coco_files.write_folder(tmp_path_factory.mktemp("masked"), coco_files.many_images(45))
    return CocoDataset(*folder, strict=True, with_masks=True)


def assert_same(a: Batch, b: Batch) -> None:
    for item in dataclasses.fields(Batch):
        x, y = getattr(a, item.name), getattr(b, item.name)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y), item.name
        else:
            assert x == y, item.name


OPTIONS = dict(batch_size=8, total_steps=12, seed=5, short_sides=(24, 32, 40), max_side=64)  # more than two epochs


# the same batches for any number of workers, any start step, any number of processes


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_batches_depend_on_neither_workers_nor_start(masked, workers, start):
    expected = list(build_train_loader(masked, **OPTIONS))[start:]
    got = list(build_train_loader(masked, **OPTIONS, workers=workers, start_step=start))
    assert len(got) == len(expected) == 12 - start
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_rate_of_the_workers(data, monkeypatch, workers):
    loader = build_train_loader(data, **{**OPTIONS, "total_steps": 4}, workers=workers, prefetch=1)
    assert loader.take_rate() == 0.0
    original = type(loader.batches).__getitem__

    def slow(self, step):
        time.sleep(0.05)
        return original(self, step)

    monkeypatch.setattr(type(loader.batches), "__getitem__", slow)
    ahead = loader._loader.prefetch_factor
    assert ahead == (1 if workers else None)
    for _ in loader:
        pass
    assert 0 < loader.take_rate() <= 8 * max(1, workers) / 0.05
    assert loader.take_rate() == 0.0
    with pytest.raises(ValueError, match="prefetch must be an integer >= 1, got 0"):
        build_train_loader(data, **OPTIONS, prefetch=0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_take_slices_of_the_global_batch(masked, world_size):
    whole = list(build_train_loader(masked, **OPTIONS))
    shares = [list(build_train_loader(masked, **OPTIONS, world_size=world_size, rank=r)) for r in range(world_size)]
    assert {len(share) for share in shares} == {len(whole)}
    size = 8 // world_size
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert {part.padded_size for part in parts} == {batch.padded_size}
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        for name in ("image_sizes", "original_sizes", "boxes", "labels", "masks", "ignore_boxes"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
        for name in ("counts", "seeds", "image_ids"):
            assert [v for part in parts for v in getattr(part, name)] == getattr(batch, name), name
        for name in ("image_index", "ignore_index"):
            shifted = torch.cat([getattr(part, name) + r * size for r, part in enumerate(parts)])
            assert torch.equal(shifted, getattr(batch, name)), name


def test_seed_changes_everything(data):
    a, b = (next(iter(build_train_loader(data, **{**OPTIONS, "seed": seed}))) for seed in (1, 2))
    assert a.image_ids != b.image_ids and not set(a.seeds) & set(b.seeds)


def test_seeds_of_images_are_all_different(data):
    seeds = [s for batch in build_train_loader(data, **OPTIONS) for s in batch.seeds]
    assert len(set(seeds)) == len(seeds) == 96 and all(type(s) is int and 0 <= s < 2**63 for s in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_global_generators_are_left_alone(data):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(build_train_loader(data, **OPTIONS, workers=1))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_resuming_past_the_end_gives_nothing(data):
    loader = build_train_loader(data, batch_size=8, total_steps=5, start_step=9)
    assert len(loader) == 0 and list(loader) == []


def test_signals_do_not_reach_the_workers(data):
    expected = list(build_train_loader(data, **OPTIONS))
    got = []
    for batch in build_train_loader(data, **OPTIONS, workers=2):
        got.append(batch)
        if len(got) == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)
                os.kill(child.pid, signal.SIGTERM)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_a_failing_program_ends(tmp_path):
    """Also when a traceback keeps the iterator, and with it the workers, alive until the process ends."""
    coco_files.write_folder(tmp_path, coco_files.many_images(20))
    code = f"""
from fastkd.data import CocoDataset, build_train_loader
data = CocoDataset({str(tmp_path / "annotations.json")!r}, {str(tmp_path / "images")!r})
batches = iter(build_train_loader(data, batch_size=4, total_steps=100, workers=2))
next(batches)
raise ValueError("something went wrong")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.strip().endswith("ValueError: something went wrong")


@pytest.mark.parametrize("orphan", [False, True])
def test_a_worker_whose_parent_was_killed_before_it_started_ends(orphan):
    """Two of a thousand kills left such a worker behind, which waited for ever."""
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _start_worker(parent + orphan, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == int(orphan)


def test_leaving_early_ends_the_workers(data):
    before = set(multiprocessing.active_children())
    for _ in build_train_loader(data, **OPTIONS, workers=2):
        assert len(set(multiprocessing.active_children()) - before) == 2
        break
    gc.collect()
    assert not set(multiprocessing.active_children()) - before


# which images a batch holds


def test_an_epoch_takes_each_image_once(data):
    loader = build_train_loader(data, batch_size=5, total_steps=0, seed=1)
    assert loader.steps_per_epoch == 9
    epochs = []
    for epoch in range(3):
        start = 9 * epoch
        batches = build_train_loader(data, batch_size=5, total_steps=start + 9, start_step=start, seed=1)
        epochs.append([i for batch in batches for i in batch.image_ids])
        assert sorted(epochs[-1]) == data.image_ids.tolist()
    assert epochs[0] != epochs[1] != epochs[2]


def test_remainder_sits_out_a_different_part_each_epoch():
    groups = np.zeros(10, np.int8)
    out = [set(range(10)) - set(epoch_batches(groups, 4, 0, epoch).ravel().tolist()) for epoch in range(40)]
    assert {len(s) for s in out} == {2} and set.union(*out) == set(range(10))


@pytest.mark.parametrize("batch_size", [3, 4, 7, 16])
def test_aspect_groups(batch_size):
    groups = np.random.default_rng(0).integers(0, 3, 200)
    batches = epoch_batches(groups, batch_size, 0, 0)
    assert batches.shape == (200 // batch_size, batch_size)
    assert len(np.unique(batches)) == batches.size
    pure = [len(set(groups[row].tolist())) == 1 for row in batches]
    assert sum(pure) >= sum((groups == g).sum() // batch_size for g in range(3))
    assert [b.tolist() for b in batches] != [b.tolist() for b in epoch_batches(groups, batch_size, 0, 1)]


def test_grouping_saves_padding(data):
    def padding(grouping):
        batches = list(build_train_loader(data, **{**OPTIONS, "divisor": 8}, aspect_grouping=grouping))
        return sum(b.images[:, 0].numel() - int(b.image_sizes.prod(1).sum()) for b in batches)

    assert padding(True) < 0.7 * padding(False)


def test_fewer_images_than_a_batch(tmp_path):
    tiny = CocoDataset(*coco_files.write_folder(tmp_path), strict=True)
    for batch in build_train_loader(tiny, batch_size=8, total_steps=3):
        assert len(batch) == 8 and set(batch.image_ids) == {5, 2, 9}


# geometry


def painted(tmp_path, width=96, height=64, box=(20, 10, 30, 24), with_masks=True):
    """One black image with a white box, given as box, polygon and run-length mask; its mirror image is a grey crowd."""
    x, y, w, h = box
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    runs = [x * height + y, *[h, height - h] * (w - 1), h, height * (width - x - w + 1) - y - h]
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": list(box)}
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "white"}],
        "annotations": [
            {**common, "id": 1, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]},
            {**common, "id": 2, "segmentation": {"size": [height, width], "counts": runs}},
            {**common, "id": 3, "iscrowd": 1},
        ],
    }
    file, images = coco_files.write_folder(tmp_path, coco)
    Image.fromarray(pixels).save(images / "a.png")
    return CocoDataset(file, images, strict=True, with_masks=with_masks)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("short_side", [None, 64, 32, 128, 100])
def test_boxes_masks_and_crowds_follow_the_pixels(tmp_path, flip, short_side):
    data = painted(tmp_path)
    sides = () if short_side is None else (short_side,)
    (batch,) = build_train_loader(data, batch_size=1, total_steps=1, short_sides=sides, flip=flip, divisor=1)
    scale = (short_side or 64) / 64
    assert batch.image_sizes.tolist() == [[round(64 * scale), round(96 * scale)]]
    white = batch.images[0, 0] > 0.1  # values between normalised black and white
    rows, columns = torch.where(white.any(1))[0], torch.where(white.any(0))[0]
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
    assert batch.boxes.shape == (2, 4) and torch.equal(batch.boxes[0], batch.boxes[1])
    assert (batch.boxes[0] - seen).abs().max() <= 1
    assert torch.equal(batch.ignore_boxes[0], batch.boxes[0]) and batch.ignore_index.tolist() == [0]
    expected = 20 * scale if flip == 0 else (96 - 50) * scale
    assert abs(float(batch.boxes[0, 0]) - expected) < 0.5
    assert batch.masks.shape == (2, *batch.padded_size) and batch.masks.dtype == torch.bool
    for mask in batch.masks:
        assert (mask & white).sum() / (mask | white).sum() > 0.9


def test_flips_half_the_time(tmp_path):
    data = painted(tmp_path, with_masks=False)
    batches = build_train_loader(data, batch_size=20, total_steps=10, short_sides=(32,))
    left = torch.cat([batch.boxes[:, 0] for batch in batches])
    assert 0.4 < (left == 10).double().mean() < 0.6 and len(left.unique()) == 2


def test_every_short_side_is_drawn(data):
    batches = list(build_train_loader(data, batch_size=8, total_steps=20, short_sides=(16, 24, 40), divisor=1))
    short = torch.cat([batch.image_sizes.min(1).values for batch in batches])
    assert sorted(short.unique().tolist()) == [16, 24, 40] and torch.bincount(short).max() < 0.5 * len(short)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [((640, 480), 800, 1333, (800, 1067)), ((480, 640), 800, 1333, (1067, 800)), ((1000, 200), 800, 1333, (267, 1333)),
     ((37, 53), None, None, (53, 37)), ((200, 100), None, 100, (50, 100)), ((4000, 3), 8, 64, (1, 64))],
)  # fmt: skip
def test_resized_size(size, short, longest, expected):
    assert resized_size(*size, short, longest) == expected


def test_normalisation_and_padding(data):
    batch = next(iter(build_train_loader(data, batch_size=6, total_steps=1, flip=0.0, aspect_grouping=False)))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    assert batch.images.dtype == torch.float32
    for b, image_id in enumerate(batch.image_ids):
        index = data.image_ids.tolist().index(image_id)
        pixels = torch.from_numpy(data.load(index).image.copy()).float()
        h, w = batch.image_sizes[b].tolist()
        assert (h, w) == tuple(pixels.shape[:2]) == tuple(batch.original_sizes[b].tolist())
        torch.testing.assert_close(batch.images[b, :, :h, :w], ((pixels - mean) / std).permute(2, 0, 1))
        assert not batch.images[b, :, h:].any() and not batch.images[b, :, :, w:].any()


@pytest.mark.parametrize("divisor", [1, 32, 128])
def test_padding_is_the_smallest_multiple_of_the_stride(data, divisor):
    for batch in build_train_loader(data, **{**OPTIONS, "total_steps": 4}, divisor=divisor):
        for padded, largest in zip(batch.padded_size, batch.image_sizes.max(0).values.tolist(), strict=True):
            assert padded % divisor == 0 and largest <= padded < largest + divisor


def test_memory_format(data):
    channels_last, contiguous = (
        next(iter(build_train_loader(data, **OPTIONS, channels_last=flag))).images for flag in (True, False)
    )
    assert channels_last.is_contiguous(memory_format=torch.channels_last) and contiguous.is_contiguous()
    assert torch.equal(channels_last, contiguous)


def test_ground_truth_fields(masked):
    for batch in build_train_loader(masked, **OPTIONS):
        assert batch.boxes.dtype == torch.float32 and batch.labels.dtype == batch.image_index.dtype == torch.int64
        assert batch.counts == torch.bincount(batch.image_index, minlength=8).tolist()
        assert batch.image_index.tolist() == sorted(batch.image_index.tolist())
        assert len(batch.masks) == len(batch.boxes) == sum(batch.counts)
        limits = batch.image_sizes[batch.image_index]
        assert (batch.boxes[:, :2] >= 0).all() and (batch.boxes[:, 2:] <= limits.flip(1) + 1e-4).all()
        assert (batch.boxes[:, 2:] > batch.boxes[:, :2]).all()


def test_batch_without_any_box(tmp_path):
    coco = coco_files.content()
    coco["annotations"] = []
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco), with_masks=True)
    batch = next(iter(build_train_loader(data, batch_size=2, total_steps=1)))
    assert batch.boxes.shape == batch.ignore_boxes.shape == (0, 4) and batch.counts == [0, 0]
    assert batch.labels.dtype == batch.image_index.dtype == batch.ignore_index.dtype == torch.int64
    assert batch.masks.shape == (0, *batch.padded_size) and batch.masks.dtype == torch.bool


# evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_once(data, workers, world_size):
    loaders = [
        build_eval_loader(data, batch_size=4, workers=workers, world_size=world_size, rank=r) for r in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]
    assert [len(b) for b in batches] == [len(loader) for loader in loaders]
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert sorted(i for part in batches for batch in part for i in batch.image_ids) == data.image_ids.tolist()


def test_evaluation_does_not_flip_and_reports_sizes(tmp_path):
    data = painted(tmp_path)
    (batch,) = build_eval_loader(data, short_side=32)
    assert batch.boxes[0].tolist() == [10, 5, 25, 17]
    assert batch.image_sizes.tolist() == [[32, 48]] and batch.original_sizes.tolist() == [[64, 96]]


# images that cannot be decoded


@pytest.fixture
def damaged(tmp_path):
    """Like `data`, with two truncated images and one file that is not an image."""
    file, images = coco_files.write_folder(tmp_path, coco_files.many_images(20))
    for name in ("3.png", "4.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-400])
    (images / "11.png").write_text("no image")
    return file, images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("build", [build_train_loader, build_eval_loader])
def test_strict_names_the_damaged_file(damaged, workers, build):
    options = {"total_steps": 5} if build is build_train_loader else {}
    with pytest.raises(BadImageError, match=r"(3|4|11)\.png"):
        list(build(CocoDataset(*damaged, strict=True), batch_size=4, workers=workers, **options))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_damaged_images_are_replaced_counted_and_logged(damaged, workers, caplog):
    data = CocoDataset(*damaged)
    expected = list(build_train_loader(data, batch_size=4, total_steps=10, seed=2))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        loader = build_train_loader(data, batch_size=4, total_steps=10, seed=2, workers=workers)
        got = list(loader)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    bad = {int(data.image_ids[i]) for i in (3, 4, 11)}
    assert len(got) == 10 and not bad & {i for batch in got for i in batch.image_ids}
    assert set(loader.bad_images) == bad
    assert loader.bad_images.total() == 2 * 4  # two epochs; 4, the replacement of 3, is bad as well
    assert len(caplog.messages) == 3 and all("replaced by the next image" in m for m in caplog.messages)
    assert any("3.png" in m for m in caplog.messages) and any("11.png" in m for m in caplog.messages)


def test_the_next_image_takes_the_place(damaged):
    data = CocoDataset(*damaged)
    whole = CocoDataset(*coco_files.write_folder(damaged[0].parent / "whole", coco_files.many_images(20)))
    following = {int(data.image_ids[i]): int(data.image_ids[j]) for i, j in ((3, 5), (4, 5), (11, 12))}
    options = dict(batch_size=4, total_steps=5, seed=2)
    for a, b in zip(build_train_loader(data, **options), build_train_loader(whole, **options), strict=True):
        assert a.image_ids == [following.get(i, i) for i in b.image_ids] and a.seeds == b.seeds


def test_ranks_keep_equal_steps_with_damaged_images(damaged):
    data = CocoDataset(*damaged)
    options = dict(batch_size=4, total_steps=10, seed=2)
    whole = list(build_train_loader(data, **options))
    shares = [list(build_train_loader(data, **options, world_size=2, rank=r)) for r in range(2)]
    assert [len(s) for s in shares] == [10, 10]
    for step, batch in enumerate(whole):
        assert shares[0][step].image_ids + shares[1][step].image_ids == batch.image_ids


def test_evaluation_leaves_damaged_images_out(damaged, caplog):
    data = CocoDataset(*damaged)
    loader = build_eval_loader(data, batch_size=1)
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        seen = [i for batch in loader for i in batch.image_ids]
    bad = {int(data.image_ids[i]) for i in (3, 4, 11)}
    assert len(loader) == 20 and sorted(seen) == sorted(set(data.image_ids.tolist()) - bad)
    assert set(loader.bad_images) == bad and len(caplog.messages) == 3


def test_no_readable_image_at_all(damaged):
    for path in damaged[1].iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(BadImageError, match="no image can be read"):
        list(build_train_loader(CocoDataset(*damaged), batch_size=4, total_steps=1))


# arguments


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": 6, "world_size": 4}, {"batch_size": 2.0}, {"total_steps": -1}, {"seed": -1},
     {"start_step": -1}, {"workers": -1}, {"divisor": 0}, {"world_size": 0}, {"rank": 1}, {"rank": -1}, {"flip": 1.5},
     {"short_sides": (0,)}, {"short_sides": (8.5,)}, {"max_side": 0}],
    ids=str,
)  # fmt: skip
def test_bad_arguments(data, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build_train_loader(data, **{"batch_size": 4, "total_steps": 1, **wrong})


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"short_side": 0}, {"max_side": -1}, {"rank": 1}], ids=str)
def test_bad_evaluation_arguments(data, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build_eval_loader(data, **wrong)


def test_augmentation_draws_from_the_given_generator():
    augmentation = Augmentation((10, 20, 30), 100)
    a, b = ([augmentation.draw(rng, 40, 20) for _ in range(20)] for rng in map(np.random.default_rng, (4, 4)))
    assert a == b and {g.height for g in a} == {10, 20, 30} and {g.flip for g in a} == {True, False}
