"""Generated scenes: deterministic, in COCO's format on disk, with the documented variety."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from fastkd.commands import data as data_commands
from fastkd.data import SCENE_CLASSES, CocoDataset, SceneStyle, generate_scenes
from fastkd.data.scenes_render import SCENE_KINDS, SHAPES, render_scene


def files_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=300, val=20, seed=7, processes=2)


def test_files_do_not_depend_on_processes(tmp_path):
    one = generate_scenes(tmp_path / "one", train=40, val=5, seed=3, processes=1)
    three = generate_scenes(tmp_path / "three", train=40, val=5, seed=3, processes=3)
    assert files_of(one) == files_of(three)
    assert len(list((one / "train").iterdir())) == 40 and len(list((one / "val").iterdir())) == 5


def test_seed_split_and_count(tmp_path):
    base = files_of(generate_scenes(tmp_path / "a", train=3, val=3, seed=0, processes=1))
    other = files_of(generate_scenes(tmp_path / "b", train=3, val=3, seed=1, processes=1))
    more = files_of(generate_scenes(tmp_path / "c", train=5, val=3, seed=0, processes=1))
    assert base["train/000000.jpg"] != other["train/000000.jpg"]
    assert base["train/000000.jpg"] != base["val/000000.jpg"]
    assert base["train/000002.jpg"] == more["train/000002.jpg"]


def test_written_once_and_again_when_arguments_differ(tmp_path):
    root = generate_scenes(tmp_path / "a", train=3, val=1, processes=1)
    (root / "train" / "000000.jpg").write_bytes(b"touched")
    generate_scenes(root, train=3, val=1, processes=2)
    assert (root / "train" / "000000.jpg").read_bytes() == b"touched"
    generate_scenes(root, train=2, val=1, processes=1)
    assert sorted(p.name for p in (root / "train").iterdir()) == ["000000.jpg", "000001.jpg"]
    assert (root / "train" / "000000.jpg").read_bytes() != b"touched"
    before = (root / "train" / "000000.jpg").read_bytes()
    generate_scenes(root, train=2, val=1, processes=1, noise=20.0)
    assert (root / "train" / "000000.jpg").read_bytes() != before


def test_interrupted_generation_is_redone(tmp_path):
    def stop(done, total):
        assert total == 61
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path / "a", train=60, val=1, processes=2, progress=stop)
    generate_scenes(tmp_path / "a", train=60, val=1, processes=1)
    assert files_of(tmp_path / "a") == files_of(generate_scenes(tmp_path / "b", train=60, val=1, processes=1))


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holiday\.txt"):
        generate_scenes(tmp_path, train=1, val=1)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.txt"]


def test_folder_of_another_data_set_is_left_alone(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text("mine")
    with pytest.raises(ValueError, match="annotations"):
        generate_scenes(tmp_path, train=1, val=1)
    assert (tmp_path / "annotations" / "train.json").read_text() == "mine"


def test_works_without_a_main_module(tmp_path):
    code = f"from fastkd.data import generate_scenes; generate_scenes({str(tmp_path / 'a')!r}, train=4, val=1)"
    subprocess.run([sys.executable, "-"], input=code, text=True, check=True)
    assert files_of(tmp_path / "a") == files_of(generate_scenes(tmp_path / "b", train=4, val=1, processes=1))


def test_annotations_are_coco(scenes):
    coco = json.loads((scenes / "annotations" / "train.json").read_text())
    assert coco["info"]["seed"] == 7 and coco["info"]["version"] >= 1
    ids = [c["id"] for c in coco["categories"]]
    assert len(ids) >= 8 and ids != list(range(1, len(ids) + 1)) and ids != list(range(len(ids)))
    assert [c["name"] for c in coco["categories"]] == list(SCENE_CLASSES)
    sizes = {i["id"]: (i["width"], i["height"]) for i in coco["images"]}
    for item in coco["images"]:
        assert Image.open(scenes / "train" / item["file_name"]).size == sizes[item["id"]]
    assert set(sizes.values()) == {(128, 128), (160, 96), (96, 160)}
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    union: dict[int, np.ndarray] = {}
    for a in coco["annotations"]:
        mask = coco_mask.decode(a["segmentation"]).astype(bool)
        assert mask.shape == sizes[a["image_id"]][::-1]
        assert a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist() and a["area"] == mask.sum() >= 6
        assert not (union.get(a["image_id"], np.zeros_like(mask)) & mask).any()  # visible parts are disjoint
        union[a["image_id"]] = union.get(a["image_id"], np.zeros_like(mask)) | mask


def test_scenes_are_as_varied_as_promised(scenes):
    data = CocoDataset(scenes / "annotations" / "train.json", scenes / "train", strict=True, with_masks=True)
    boxes, labels, owner = data.objects()
    assert not data.skipped and data.clipped == 0
    assert np.bincount(labels, minlength=data.num_classes).min() > 40
    side = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert ((side >= 14) & (side <= 66)).mean() > 0.6
    assert (side < 12).sum() > 10 and (side > 70).sum() > 10 and side.min() >= 6
    share = np.prod(boxes[:, 2:] - boxes[:, :2], 1) / np.prod(data.sizes[owner], 1)
    assert 0.3 < share.max() < 0.75
    counts = Counter(np.bincount(owner, minlength=len(data)).tolist())
    assert 0 < counts[0] < 40 and set(counts) >= set(range(1, 9)) and max(counts) <= 9


def test_colour_does_not_tell_the_class(scenes):
    data = CocoDataset(scenes / "annotations" / "train.json", scenes / "train", with_masks=True)
    colours: dict[int, list] = {label: [] for label in range(data.num_classes)}
    for i in range(len(data)):
        sample = data.load(i)
        for label, mask in zip(sample.labels, sample.masks, strict=True):
            colours[int(label)].append(sample.image[mask].mean(0))
    means = np.array([np.mean(c, 0) for c in colours.values()])
    spread = np.mean([np.std(c, 0) for c in colours.values()])
    assert np.abs(means - means.mean(0)).max() < 0.6 * spread


def test_some_classes_differ_by_texture_only():
    by_shape = Counter(shape for _, shape, _ in SCENE_KINDS.values())
    assert max(by_shape.values()) >= 2 and len(by_shape) >= 5
    seen = [(shape, texture) for _, shape, textures in SCENE_KINDS.values() for texture in textures]
    assert len(seen) == len(set(seen)) and all(shape in SHAPES for shape, _ in seen)


def count_objects(**style):
    look = SceneStyle(**style)
    return sum(len(render_scene(np.random.default_rng(i), look)[1]) for i in range(60))


def test_difficulty_arguments():
    assert count_objects(min_visible=0.95) < count_objects(min_visible=0.2)
    assert count_objects(empty=1.0) == 0
    assert count_objects(max_objects=1) <= 60
    assert count_objects(clutter=0.0, min_visible=0.9) > count_objects(clutter=12.0, min_visible=0.9)
    assert count_objects(occlusion=0.0, min_visible=0.9) > count_objects(occlusion=1.0, min_visible=0.9)


@pytest.mark.parametrize(("name", "low", "high"), [("noise", 0.0, 30.0), ("contrast", 0.2, 1.5), ("blur", 5.0, 0.0)])
def test_appearance_arguments(name, low, high):
    def detail(value):
        style = SceneStyle(**{name: value}, sizes=((96, 64),))
        pictures = [render_scene(np.random.default_rng(i), style)[0].astype(float) for i in range(20)]
        assert all(p.shape == (64, 96, 3) for p in pictures)
        return np.mean([np.abs(np.diff(p, axis=1)).mean() for p in pictures])

    assert detail(low) < detail(high)


def test_size_and_rotation_arguments():
    def sides(**style):
        look = SceneStyle(**style, clutter=0.0, occlusion=0.0)
        masks = [m for i in range(60) for m in render_scene(np.random.default_rng(i), look)[2]]
        return np.median([max(np.ptp(axis) + 1 for axis in np.nonzero(m)) for m in masks]), masks

    assert sides(typical=(10.0, 14.0))[0] < 16 < sides(typical=(30.0, 40.0))[0]
    upright, turned = (sides(rotation=r, max_objects=1)[1] for r in (0.0, 1.5))
    square = [m.sum() / np.prod([np.ptp(a) + 1 for a in np.nonzero(m)]) for m in upright]
    assert max(square) == 1.0  # an axis-aligned square fills its box
    assert np.mean([m.sum() for m in turned]) > 0 and not all(
        np.array_equal(a, b) for a, b in zip(upright, turned, strict=False)
    )


def test_a_theme_has_large_objects_of_few_classes(tmp_path):
    data_commands.scenes(tmp_path / "theme", train=60, val=2, style="theme", processes=1)
    data = CocoDataset(tmp_path / "theme" / "annotations" / "train.json", tmp_path / "theme" / "train")
    boxes, labels, owner = data.objects()
    assert np.median((boxes[:, 2:] - boxes[:, :2]).max(1)) > 36
    classes = [len(set(labels[owner == image])) for image in set(owner.tolist())]
    assert set(classes) == {1, 2} and len(set(labels.tolist())) == data.num_classes


def test_objects_differ_from_what_they_cover():
    """The mask is where the object is painted: without the object exactly the pixels inside the mask change."""
    style = SceneStyle(max_objects=1, noise=0.0, blur=0.0, clutter=0.0, empty=0.0)
    changed = []
    for seed in range(30):
        picture, _, masks = render_scene(np.random.default_rng(seed), style)
        if len(masks):
            inside = picture[masks[0]].astype(float)
            ring = masks[0].copy()
            for axis in (0, 1):
                ring |= np.roll(ring, 3, axis) | np.roll(ring, -3, axis)
            changed.append(np.abs(inside.mean(0) - picture[ring & ~masks[0]].astype(float).mean(0)).max())
    assert len(changed) > 25 and np.median(changed) > 20


@pytest.mark.parametrize(
    "arguments",
    [{"train": -1}, {"val": 1.5}, {"seed": -2}, {"processes": 0}, {"noise": -1.0}, {"occlusion": 1.5}, {"sizes": ()},
     {"sizes": ((8, 8),)}, {"min_visible": 0.0}, {"max_objects": 0}, {"typical": (20.0, 10.0)}, {"rotation": 4.0},
     {"max_classes": 0}, {"max_classes": 11}],
    ids=str,
)  # fmt: skip
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        generate_scenes(tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_unknown_argument(tmp_path):
    with pytest.raises(TypeError, match="nois"):
        generate_scenes(tmp_path / "a", nois=3)
