"""CocoDataset on good files: labels, crowds, empty images, masks, flat memory, priors."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from fastkd.data import BadImageError, CocoDataset, measure_priors
from fastkd.masks import decode_run_lengths, pack_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return coco_files.write_folder(tmp_path)


def test_labels_are_places_of_sorted_sparse_ids(folder):
    data = CocoDataset(*folder, strict=True)
    assert data.category_ids == [3, 17, 90] and data.num_classes == 3
    assert data.class_names == ["dog", "cat", "toothbrush"]
    assert data.image_ids.tolist() == [5, 2, 9] and data.sizes.tolist() == [[10, 8], [12, 6], [8, 8]]
    assert [data.file_name(i) for i in range(3)] == ["a.png", "sub/b.png", "c.png"]
    assert len(data) == 3 and not data.skipped


def test_objects_crowds_and_images_without(folder):
    data = CocoDataset(*folder, strict=True)
    boxes, labels, ignore = data.targets(0)
    assert boxes.tolist() == [[0, 0, 5, 4], [6, 1, 9, 6]] and labels.tolist() == [2, 1]
    assert ignore.tolist() == [[2, 3, 8, 7]]
    boxes, labels, ignore = data.targets(1)
    assert boxes.shape == (0, 4) and labels.shape == (0,) and ignore.shape == (0, 4)
    assert data.targets(2)[0].tolist() == [[1, 2, 5, 5]] and data.targets(2)[1].tolist() == [0]
    boxes, labels, owner = data.objects()
    assert len(boxes) == 3 and labels.tolist() == [2, 1, 0] and owner.tolist() == [0, 0, 2]


def test_load_gives_the_file(folder):
    data = CocoDataset(*folder, with_masks=True)
    for i in range(3):
        sample = data.load(i)
        assert np.array_equal(sample.image, np.asarray(Image.open(folder[1] / data.file_name(i))))
        assert sample.image_id == data.image_ids[i]
        assert sample.masks.shape == (len(sample.boxes), *sample.image.shape[:2]) and sample.masks.dtype == bool
    assert CocoDataset(*folder).load(0).masks is None


def test_images_without_objects_can_be_dropped(tmp_path):
    coco = coco_files.content()
    coco["images"].append({"id": 1, "file_name": "d.png", "width": 9, "height": 9})  # only a crowd annotation
    coco["annotations"].append({"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 3, 3], "iscrowd": 1})
    file = coco_files.write_folder(tmp_path, coco)
    whole = CocoDataset(*file, with_masks=True)
    data = CocoDataset(*file, with_masks=True, keep_empty=False)
    assert len(whole) == 4 and data.image_ids.tolist() == [5, 9]
    for i, j in ((0, 0), (1, 2)):
        assert data.file_name(i) == whole.file_name(j)
        for kept, before in zip(data.targets(i), whole.targets(j), strict=True):
            assert np.array_equal(kept, before)
        assert np.array_equal(data.masks(i), whole.masks(j))
        assert np.array_equal(data.load(i).image, whole.load(j).image)


def test_dropping_every_image_is_an_error(tmp_path):
    coco = coco_files.content()
    coco["annotations"] = coco["annotations"][2:3]
    with pytest.raises(ValueError, match="keep_empty"):
        CocoDataset(*coco_files.write_folder(tmp_path, coco), keep_empty=False)


def test_boxes_reaching_out_are_clipped(tmp_path):
    coco = coco_files.content()
    coco["annotations"][1]["bbox"] = [-3, -2, 30, 5.5]
    coco["annotations"][3]["bbox"] = [6, 1, 4.5, 5]  # half a pixel outside: rounding, not counted
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco), strict=True)
    assert data.targets(0)[0].tolist() == [[0, 0, 10, 3.5], [6, 1, 10, 6]]
    assert data.clipped == 1


@pytest.mark.parametrize("classes", [1, 2, 365])
def test_any_class_count(tmp_path, classes):
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco_files.many_images(20, classes=classes)), strict=True)
    assert data.num_classes == classes and data.category_ids == [7 * c for c in range(classes)]
    assert data.objects()[1].max() < classes


def test_file_without_annotations_is_a_data_set(tmp_path):
    coco = coco_files.content()
    coco["annotations"] = []
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco), strict=True, with_masks=True)
    assert len(data) == 3 and data.load(0).masks.shape == (0, 8, 10)


def test_missing_area_and_iscrowd_are_fine(tmp_path):
    coco = coco_files.content()
    for item in coco["annotations"]:
        item.pop("area")
        item.pop("iscrowd")
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco), strict=True)
    assert len(data.targets(0)[0]) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_pixel_formats(folder, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    image = Image.open(folder[1] / "c.png").convert(mode)
    image.save(folder[1] / "c.png", format=suffix.replace("tif", "tiff"))
    assert np.array_equal(CocoDataset(*folder).load(2).image, np.asarray(image.convert("RGB")))


# masks


def test_masks_of_every_form(folder):
    data = CocoDataset(*folder, with_masks=True, strict=True)
    first, second = data.masks(0)
    expected = np.zeros((8, 10), bool)
    expected[0:4, 0:5] = True
    assert np.array_equal(first, expected)
    expected[:] = False
    expected[1:6, 6:9] = True
    assert np.array_equal(second, expected)
    assert data.masks(1).shape == (0, 6, 12)
    assert data.masks(2)[0].sum() == 12


def test_several_polygons_and_compressed_runs(tmp_path):
    coco = coco_files.content()
    polygons = [[0.5, 0.5, 4, 1, 3, 6], [6, 2, 9.5, 2.5, 8, 7, 6, 6]]
    coco["annotations"][1]["segmentation"] = polygons
    blob = np.asfortranarray(np.random.default_rng(0).random((8, 10)) < 0.5)
    packed = coco_mask.encode(blob.astype(np.uint8))
    coco["annotations"][3]["segmentation"] = {"size": [8, 10], "counts": packed["counts"].decode()}
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco), with_masks=True, strict=True)
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 8, 10))).astype(bool)
    assert np.array_equal(data.masks(0)[0], drawn) and drawn.any()
    assert np.array_equal(data.masks(0)[1], blob)


def test_masks_at_another_size(tmp_path):
    data = CocoDataset(*coco_files.write_folder(tmp_path), with_masks=True)
    twice = data.masks(0, (16, 20))
    for mask, large in zip(data.masks(0), twice, strict=True):
        assert np.array_equal(large, mask.repeat(2, 0).repeat(2, 1))
    half = data.masks(0, (4, 5))
    assert half.shape == (2, 4, 5) and half[1].any()


def test_masks_need_the_option(folder):
    with pytest.raises(ValueError, match="with_masks=True"):
        CocoDataset(*folder).masks(0)


@pytest.mark.parametrize("seed", range(12))
def test_run_lengths_against_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 400, 2))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(6))):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        mask[y : y + int(rng.integers(1, height + 1)), x : x + int(rng.integers(1, width + 1))] ^= 1
    if seed % 3 == 0:
        mask ^= (rng.random(mask.shape) < 0.1).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"]
    runs = decode_run_lengths(packed)
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(flat.reshape(width, height).T, mask)
    segmentation = {"size": [height, width], "counts": packed.decode()}
    assert pack_runs(segmentation, height, width) == packed
    assert pack_runs({"size": [height, width], "counts": runs.tolist()}, height, width) == packed


# memory


def reachable(data) -> int:
    """Number of Python objects reachable from the data set; each has a reference count that a worker would write."""
    seen, waiting = set(), [vars(data)]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type) or type(item).__name__ in ("module", "function"):
            continue
        seen.add(id(item))
        waiting += gc.get_referents(item)
    return len(seen)


def crowded(folder: Path, boxes: int, masks: bool = False) -> tuple[Path, Path]:
    """Annotation file of 50 images with that many boxes in all."""
    coco = coco_files.many_images(50)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 8, (boxes, 4))
    coco["annotations"] = [
        {"id": k, "image_id": 100 + 3 * (k % 50), "category_id": 7 * (k % 3), "bbox": [x, y, 4 + w, 4 + h]}
        for k, (x, y, w, h) in enumerate(corners.tolist())
    ]
    if masks:
        for k, item in enumerate(coco["annotations"]):
            x, y, w, h = item["bbox"]
            width, height = coco["images"][k % 50]["width"], coco["images"][k % 50]["height"]
            runs = [x * height + y, *[h, height - h] * (w - 1), h, height * (width - x - w + 1) - y - h]
            triangle = [[x, y, x + w, y, x + w, y + h]]
            item["segmentation"] = triangle if k % 2 else {"size": [height, width], "counts": runs}
    return coco_files.write_folder(folder, coco)


def test_no_python_objects_per_box(tmp_path):
    few = CocoDataset(*crowded(tmp_path / "few", 100), strict=True)
    many = CocoDataset(*crowded(tmp_path / "many", 20_000), strict=True)
    assert abs(reachable(many) - reachable(few)) < 10
    assert (many.nbytes - few.nbytes) / 19_900 <= 32
    assert len(many.objects()[0]) == 20_000


def test_no_python_objects_per_mask(tmp_path):
    few = CocoDataset(*crowded(tmp_path / "few", 100, masks=True), strict=True, with_masks=True)
    many = CocoDataset(*crowded(tmp_path / "many", 4_000, masks=True), strict=True, with_masks=True)
    assert abs(reachable(many) - reachable(few)) < 10
    assert (many.nbytes - few.nbytes) / 3_900 <= 120
    assert np.array_equal(few.masks(7)[0], many.masks(7)[0]) and many.masks(7)[0].any() and many.masks(8)[0].any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_do_not_grow_with_the_annotation_file():
    """benchmarks/data_memory.py at 100,000 boxes; its default is a million."""
    command = [sys.executable, str(ROOT / "benchmarks" / "data_memory.py"), "--boxes", "100000", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    growth = {(row["held as"], row["boxes"]): row["growth of a worker, MB"] for row in rows}
    assert growth["arrays", 100_000] - growth["arrays", 1_000] < 5
    assert growth["objects", 100_000] > 15  # the measured memory is that of the boxes


# priors


def test_priors_by_hand(tmp_path):
    coco = coco_files.content()
    coco["annotations"].append({"id": 1, "image_id": 2, "category_id": 90, "bbox": [0, 0, 12, 3]})
    priors = measure_priors(CocoDataset(*coco_files.write_folder(tmp_path, coco)))
    assert priors.num_classes == 3 and priors.frequency.dtype == torch.float64
    torch.testing.assert_close(priors.frequency, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    mean = torch.tensor([[4 / 8, 3 / 8], [3 / 10, 5 / 8], [(0.5 + 1) / 2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(priors.mean, mean)
    std = torch.tensor([[0, 0], [0, 0], [0.25, 0]], dtype=torch.float64)
    torch.testing.assert_close(priors.std, std)


def test_priors_of_a_class_without_boxes(tmp_path):
    coco = coco_files.content()
    coco["categories"].append({"id": 50, "name": "unicorn"})
    priors = measure_priors(CocoDataset(*coco_files.write_folder(tmp_path, coco)))
    assert priors.frequency[2] == 0 and not priors.mean[2].any() and not priors.std[2].any()
    assert priors.frequency.sum() == 1


def test_priors_against_a_loop(tmp_path):
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco_files.many_images(60)))
    sizes: dict[int, list] = {}
    for i in range(len(data)):
        boxes, labels, _ = data.targets(i)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            sizes.setdefault(label, []).append([(x2 - x1) / data.sizes[i, 0], (y2 - y1) / data.sizes[i, 1]])
    priors = measure_priors(data)
    for label, found in sizes.items():
        np.testing.assert_allclose(priors.mean[label], np.mean(found, 0))
        np.testing.assert_allclose(priors.std[label], np.std(found, 0))


def test_priors_need_boxes(tmp_path):
    coco = coco_files.content()
    coco["annotations"] = []
    with pytest.raises(ValueError, match="at least one box"):
        measure_priors(CocoDataset(*coco_files.write_folder(tmp_path, coco)))


def test_bad_image_error_names_the_file(folder):
    data = CocoDataset(*folder)
    (folder[1] / "c.png").write_bytes(b"nothing")
    with pytest.raises(BadImageError, match=r"c\.png"):
        data.load(2)
