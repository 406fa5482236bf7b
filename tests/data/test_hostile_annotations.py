"""Broken or malicious annotation files and image folders: each gives a clear error or a counted and logged skip."""

import json
import logging
import os
import struct
import zlib

import coco_files
import numpy as np
import pytest
from PIL import Image

from fastkd.data import BadImageError, CocoDataset
from fastkd.masks import decode_run_lengths

NAN, INF = float("nan"), float("inf")


def change(coco: dict, place: tuple, value) -> dict:
    """Set coco[place[0]][place[1]]...; a value of `...` removes the entry."""
    target = coco
    for key in place[:-1]:
        target = target[key]
    if value is ...:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return coco


def write_changed(root, place, value, with_images=True):
    """A copy of the valid folder with one entry of the annotation file changed."""
    file, images = coco_files.write_folder(root)
    file.write_text(json.dumps(change(coco_files.content(), place, value)))
    return file, images


# errors of the whole file: always raised, and they name the file


WHOLE = [
    ("empty", b"", "not JSON"),
    ("truncated", json.dumps(coco_files.CONTENT).encode()[:-40], "not JSON.*truncated"),
    ("binary", bytes(range(256)), "not JSON"),
    ("not unicode", b'{"images": "\xff\xfe"}', "not JSON"),
    ("deep", b"[" * 100_000, "not JSON"),
    ("number of a million digits", b'{"images": ' + b"9" * 1_000_000 + b"}", "not JSON"),
    ("list", b"[]", "must hold an object, got a list"),
    ("number", b"3", "must hold an object, got a int"),
    ("null", b"null", "must hold an object, got a NoneType"),
    ("no keys", b"{}", "'images' must be a list, got nothing"),
    ("no annotations", b'{"images": [], "categories": []}', "'annotations' must be a list, got nothing"),
    ("images an object", b'{"images": {}, "annotations": [], "categories": []}', "'images' must be a list, got a dict"),
    (
        "categories text",
        b'{"images": [], "annotations": [], "categories": "x"}',
        "must be a list, got a str",
    ),
    ("no category", b'{"images": [], "annotations": [], "categories": []}', "at least one class"),
    (
        "no image",
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        "at least one usable image",
    ),
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("content", "message"), [case[1:] for case in WHOLE], ids=[case[0] for case in WHOLE])
def test_broken_file(tmp_path, content, message, strict):
    file, images = coco_files.write_folder(tmp_path)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        CocoDataset(file, images, strict=strict)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


CATEGORIES = [
    (("categories", 0), 5, "category number 0"),
    (("categories", 1), {"name": "a"}, "category number 1"),
    (("categories", 1, "id"), "3", "category number 1"),
    (("categories", 1, "id"), 3.0, "category number 1"),
    (("categories", 1, "id"), True, "category number 1"),
    (("categories", 1, "id"), 2**63, "category number 1"),
    (("categories", 1, "id"), 17, "category id 17 must be unique"),
    (("categories", 2, "name"), None, "category number 2"),
    (("categories", 2, "name"), ["a"], "category number 2"),
]


@pytest.mark.parametrize(("place", "value", "message"), CATEGORIES, ids=str)
def test_broken_categories(tmp_path, place, value, message):
    with pytest.raises(ValueError, match=message):
        CocoDataset(*write_changed(tmp_path, place, value))


def test_missing_file_and_folder(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"annotation_file must be an existing file.*nowhere"):
        CocoDataset(tmp_path / "nowhere.json", images)
    with pytest.raises(FileNotFoundError, match="annotation_file must be an existing file"):
        CocoDataset(tmp_path, images)
    with pytest.raises(FileNotFoundError, match=r"image_dir must be an existing folder.*nowhere"):
        CocoDataset(file, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="image_dir must be an existing folder"):
        CocoDataset(file, file)


def test_byte_order_mark_is_fine(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert len(CocoDataset(file, images, strict=True)) == 3


# errors of a single box: skipped and counted, or an error that names file and annotation


ANNOTATIONS = [  # change of annotation 12 (second in the file, first of image 5), reason
    ((), None, "malformed annotation"),
    ((), [1, 2], "malformed annotation"),
    ((), "text", "malformed annotation"),
    (("id",), ..., "malformed annotation"),
    (("id",), "12", "malformed annotation"),
    (("id",), 12.0, "malformed annotation"),
    (("id",), True, "malformed annotation"),
    (("id",), 2**63, "malformed annotation"),
    (("id",), 11, "duplicate annotation id"),
    (("image_id",), ..., "unknown image id"),
    (("image_id",), 4, "unknown image id"),
    (("image_id",), "5", "unknown image id"),
    (("image_id",), [5], "unknown image id"),
    (("image_id",), 10**30, "unknown image id"),
    (("category_id",), ..., "unknown category id"),
    (("category_id",), 4, "unknown category id"),
    (("category_id",), "90", "unknown category id"),
    (("category_id",), {}, "unknown category id"),
    (("category_id",), True, "unknown category id"),
    (("iscrowd",), 2, "malformed annotation"),
    (("iscrowd",), "0", "malformed annotation"),
    (("iscrowd",), None, "malformed annotation"),
    (("bbox",), ..., "malformed box"),
    (("bbox",), None, "malformed box"),
    (("bbox",), {}, "malformed box"),
    (("bbox",), [1, 2, 3], "malformed box"),
    (("bbox",), [1, 2, 3, 4, 5], "malformed box"),
    (("bbox",), [1, 2, "3", 4], "malformed box"),
    (("bbox",), [1, 2, None, 4], "malformed box"),
    (("bbox",), [1, 2, True, 4], "malformed box"),
    (("bbox",), [[1, 2, 3, 4]], "malformed box"),
    (("bbox",), [NAN, 2, 3, 4], "box not finite"),
    (("bbox",), [1, 2, 3, NAN], "box not finite"),
    (("bbox",), [1, 2, INF, 4], "box not finite"),
    (("bbox",), [-INF, 2, INF, 4], "box not finite"),
    (("bbox",), [10**400, 2, 3, 4], "box not finite"),
    (("bbox",), [1, 2, 0, 4], "box of no size"),
    (("bbox",), [1, 2, 3, 0.0], "box of no size"),
    (("bbox",), [1, 2, -3, 4], "box of no size"),
    (("bbox",), [1, 2, 3, -1e-9], "box of no size"),
    (("bbox",), [1, 2, 1e-30, 4], "box of no size"),
    (("bbox",), [1, 2, 0.009, 4], "box of no size"),
    (("bbox",), [9.995, 2, 7, 4], "box outside the image"),  # all but a sliver is outside
    (("bbox",), [10, 2, 3, 4], "box outside the image"),
    (("bbox",), [1, 8, 3, 4], "box outside the image"),
    (("bbox",), [-5, 2, 5, 4], "box outside the image"),
    (("bbox",), [1, -100, 3, 4], "box outside the image"),
    (("bbox",), [1e300, 2, 1e300, 4], "box outside the image"),
]


@pytest.mark.parametrize(("place", "value", "reason"), ANNOTATIONS, ids=str)
def test_bad_annotation(tmp_path, caplog, place, value, reason):
    file, images = write_changed(tmp_path, ("annotations", 1, *place), value)
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        data = CocoDataset(file, images)
    assert data.skipped == {reason: 1}
    assert data.targets(0)[0].tolist() == [[6, 1, 9, 6]] and data.targets(2)[0].tolist() == [[1, 2, 5, 5]]
    assert any(str(file) in message and "annotation" in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r"annotation (12|11|number 1)") as caught:
        CocoDataset(file, images, strict=True)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


def test_enormous_numbers_are_clipped(tmp_path):
    data = CocoDataset(*write_changed(tmp_path, ("annotations", 1, "bbox"), [-1e308, -1e308, 1.7e308, 1.7e308]))
    assert data.targets(0)[0][0].tolist() == [0, 0, 10, 8] and data.clipped == 1


def test_reasons_are_counted_and_few_are_logged(tmp_path, caplog):
    coco = coco_files.content()
    coco["annotations"] += [{"id": 100 + k, "image_id": 5, "category_id": 3, "bbox": [1, 1, 0, 1]} for k in range(50)]
    coco["annotations"] += [{"id": 200 + k, "image_id": 5, "category_id": 4, "bbox": [1, 1, 1, 1]} for k in range(2)]
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        data = CocoDataset(*coco_files.write_folder(tmp_path, coco))
    assert data.skipped == {"box of no size": 50, "unknown category id": 2}
    assert len(caplog.messages) == 3 + 2 + 1
    assert "50 x box of no size, 2 x unknown category id" in caplog.messages[-1]


def test_no_usable_annotation_is_an_error(tmp_path):
    coco = coco_files.content()
    for item in coco["annotations"]:
        item["image_id"] += 1000
    with pytest.raises(ValueError, match="4 x unknown image id"):
        CocoDataset(*coco_files.write_folder(tmp_path, coco))


def test_repeated_annotation_keeps_the_first(tmp_path):
    coco = coco_files.content()
    coco["annotations"].append({**coco["annotations"][1], "bbox": [0, 0, 1, 1]})
    data = CocoDataset(*coco_files.write_folder(tmp_path, coco))
    assert data.targets(0)[0].tolist() == [[0, 0, 5, 4], [6, 1, 9, 6]]
    assert data.skipped == {"duplicate annotation id": 1}


# masks


SEGMENTATIONS = [
    ...,
    None,
    5,
    "text",
    [],
    {},
    [[]],
    [5, 6, 7, 8, 9, 10],
    [[1, 1, 2, 2]],
    [[1, 1, 2, 2, 3, 3, 4]],
    [[1, 1, 2, 2, 3, "3"]],
    [[1, 1, 2, 2, 3, NAN]],
    [[1, 1, 2, 2, 3, INF]],
    [[1, 1, 2, 2, 3, None]],
    [[1, 1, 2, 2, 3, 10**400]],
    [[1, 1, 2, 2, 1e9, 1e9]],  # rasterising it would need a terabyte
    [[1, 1, 2, 2, 3, 500]],
    [[1, 1, 5, 1, 5, 5], "x"],
    {"size": [8, 10]},
    {"counts": [80]},
    {"size": [10, 8], "counts": [80]},
    {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": "8x10", "counts": [80]},
    {"size": [8, 10], "counts": [79]},
    {"size": [8, 10], "counts": [81]},
    {"size": [8, 10], "counts": [-20, 100]},
    {"size": [8, 10], "counts": [2**40, -(2**40) + 80]},
    {"size": [8, 10], "counts": [40.0, 40.0]},
    {"size": [8, 10], "counts": ["80"]},
    {"size": [8, 10], "counts": []},
    {"size": [8, 10], "counts": ""},
    {"size": [8, 10], "counts": 80},
    {"size": [8, 10], "counts": "oooooooooooooooooooo"},  # the last number has no end
    {"size": [8, 10], "counts": "0"},
    {"size": [8, 10], "counts": "zzzz"},
    {"size": [8, 10], "counts": "ooooooooooo0"},
    {"size": [8, 10], "counts": "\u4e2d\u6587"},
    {"size": [8, 10], "counts": "\x00\x01"},
    {"size": [8, 10], "counts": "ooo1ooo1ooo1"},
]


@pytest.mark.parametrize("segmentation", SEGMENTATIONS, ids=repr)
def test_bad_segmentation(tmp_path, segmentation):
    file, images = write_changed(tmp_path, ("annotations", 1, "segmentation"), segmentation)
    assert len(CocoDataset(file, images, strict=True).targets(0)[0]) == 2  # masks were not requested
    data = CocoDataset(file, images, with_masks=True)
    assert data.skipped == {"bad segmentation": 1}
    assert data.masks(0).shape == (1, 8, 10) and data.masks(0).sum() == 15
    with pytest.raises(ValueError, match="annotation 12: segmentation"):
        CocoDataset(file, images, strict=True, with_masks=True)


def test_crowds_need_no_mask(tmp_path):
    data = CocoDataset(*write_changed(tmp_path, ("annotations", 2, "segmentation"), ...), strict=True, with_masks=True)
    assert data.masks(0).shape == (2, 8, 10) and len(data.targets(0)[2]) == 1


def test_random_run_length_strings_never_reach_the_decoder():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = rng.integers(40, 120, int(rng.integers(0, 30))).astype(np.uint8).tobytes()
        try:
            runs = decode_run_lengths(text)
        except ValueError:
            continue
        assert runs.dtype == np.int64 and len(runs)


# errors of a single image


IMAGES = [  # change of image 2 (second in the file, in a sub-folder), reason
    ((), None, "malformed image entry"),
    ((), "sub/b.png", "malformed image entry"),
    (("id",), ..., "malformed image entry"),
    (("id",), "2", "malformed image entry"),
    (("id",), 2.5, "malformed image entry"),
    (("id",), 5, "duplicate image id"),
    (("file_name",), ..., "malformed image entry"),
    (("file_name",), 7, "malformed image entry"),
    (("width",), ..., "malformed image entry"),
    (("width",), "12", "malformed image entry"),
    (("width",), 12.0, "malformed image entry"),
    (("width",), 0, "malformed image entry"),
    (("height",), -6, "malformed image entry"),
    (("height",), NAN, "malformed image entry"),
    (("height",), True, "malformed image entry"),
    (("height",), 10**9, "image too large"),
    (("width",), 10**30, "image too large"),
    (("file_name",), "", "file name outside the image folder"),
    (("file_name",), ".", "file name outside the image folder"),
    (("file_name",), "..", "file name outside the image folder"),
    (("file_name",), "../outside.png", "file name outside the image folder"),
    (("file_name",), "sub/../../outside.png", "file name outside the image folder"),
    (("file_name",), "sub/../a.png", "file name outside the image folder"),
    (("file_name",), "/etc/passwd", "file name outside the image folder"),
    (("file_name",), "//etc/passwd", "file name outside the image folder"),
    (("file_name",), "a.png\0.txt", "file name outside the image folder"),
    (("file_name",), "link.png", "file name outside the image folder"),
    (("file_name",), "linked/outside.png", "file name outside the image folder"),
    (("file_name",), "nothing.png", "image file missing"),
    (("file_name",), "nowhere/b.png", "image file missing"),
    (("file_name",), "sub", "image file missing"),
    (("file_name",), "pipe", "image file missing"),
    (("file_name",), "dangling.png", "image file missing"),
    (("file_name",), "a.png/b.png", "image file missing"),
    (("file_name",), "x" * 5000, "image file missing"),
    (("file_name",), "y/" * 3000 + "b.png", "image file missing"),
    (("file_name",), "\ud800.png", "image file missing"),
    (("file_name",), "A.PNG", "image file missing"),
]


@pytest.fixture
def surroundings(tmp_path):
    """An image outside the image folder, links to it, and a named pipe."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (tmp_path / "data" / "outside.png", tmp_path / "outside" / "outside.png"):
        Image.new("RGB", (12, 6)).save(path)
    os.symlink(tmp_path / "data" / "outside.png", images / "link.png")
    os.symlink(tmp_path / "outside", images / "linked")
    os.symlink(images / "nothing-there.png", images / "dangling.png")
    os.mkfifo(images / "pipe")
    return tmp_path / "data"


@pytest.mark.parametrize(("place", "value", "reason"), IMAGES, ids=lambda v: repr(v)[:40])
def test_bad_image_entry(surroundings, caplog, place, value, reason):
    file, images = write_changed(surroundings, ("images", 1, *place), value)
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        data = CocoDataset(file, images)
    assert data.skipped == {reason: 1} and data.image_ids.tolist() == [5, 9]
    assert len(data.objects()[0]) == 3
    assert any(str(file) in message and "image " in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r"image (2|5|number 1)") as caught:
        CocoDataset(file, images, strict=True)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


def test_boxes_of_an_image_left_out_are_counted(tmp_path):
    data = CocoDataset(*write_changed(tmp_path, ("images", 0, "file_name"), "nothing.png"))
    assert data.skipped == {"image file missing": 1, "box of an image left out": 3}
    assert data.image_ids.tolist() == [2, 9] and len(data.objects()[0]) == 1


def test_no_usable_image_is_an_error(tmp_path):
    coco = coco_files.content()
    file, _ = coco_files.write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{len(coco['images'])} x image file missing"):
        CocoDataset(file, tmp_path / "empty")


def test_links_inside_the_folder_are_fine(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    (images / "a.png").rename(images / "real.png")
    os.symlink("real.png", images / "a.png")
    (images / "sub").rename(images / "real-sub")
    os.symlink("real-sub", images / "sub")
    os.symlink(images, tmp_path / "linked")
    data = CocoDataset(file, tmp_path / "linked", strict=True)
    assert [data.load(i).image.shape for i in range(3)] == [(8, 10, 3), (6, 12, 3), (8, 8, 3)]


# errors of image files, found when they are decoded


def png(width: int, height: int, data: bytes) -> bytes:
    """Bytes of a PNG with the given header, valid or not."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def cut(path, kind):
    """Bytes of an image encoded in a format, without the last third."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=kind)
    return path.read_bytes()[: path.stat().st_size * 2 // 3]


FILES = [
    ("empty", lambda path: b"", "cannot be read"),
    ("text", lambda path: b"hello", "cannot be read"),
    ("zeros", lambda path: bytes(1000), "cannot be read"),
    ("header only", lambda path: b"\x89PNG\r\n\x1a\n", "cannot be read"),
    ("truncated png", lambda path: cut(path, "png"), "cannot be read"),
    ("truncated jpeg", lambda path: cut(path, "jpeg"), "cannot be read"),
    ("truncated bmp", lambda path: cut(path, "bmp"), "cannot be read"),
    ("other size", lambda path: png(63, 64, bytes(64 * (63 * 3 + 1))), "63 x 64 pixels, the annotation says 64 x 64"),
    ("too little data", lambda path: png(64, 64, bytes(50)), "cannot be read"),
    ("over the limit", lambda path: png(20_000, 6_000, b""), "more than the limit"),
    ("bomb", lambda path: png(60_000, 60_000, b""), "cannot be read|more than the limit"),
    ("absurd", lambda path: png(2**31 - 1, 2**31 - 1, b""), "cannot be read|more than the limit"),
    ("postscript", lambda path: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "cannot be read"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("make", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_bad_image_file(tmp_path, make, message):
    coco = coco_files.content()
    coco["images"][2] |= {"width": 64, "height": 64}
    file, images = coco_files.write_folder(tmp_path, coco)
    (images / "c.png").write_bytes(make(tmp_path / "scratch"))
    with pytest.raises(BadImageError, match=message) as caught:
        CocoDataset(file, images).load(2)
    assert str(images / "c.png") in str(caught.value)


def test_sixteen_bits_a_channel(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(images / "c.png")
    with pytest.raises(BadImageError, match="not 8 bits a channel"):
        CocoDataset(file, images).load(2)


def test_pixel_limit_is_an_argument(tmp_path):
    folder = coco_files.write_folder(tmp_path)
    data = CocoDataset(*folder, max_pixels=72)
    assert data.skipped == {"image too large": 1, "box of an image left out": 3} and data.image_ids.tolist() == [2, 9]


def test_image_replaced_by_a_pipe_after_the_check(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    data = CocoDataset(file, images)
    (images / "c.png").unlink()
    os.mkfifo(images / "c.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        data.load(2)


def test_image_removed_after_the_check(tmp_path):
    file, images = coco_files.write_folder(tmp_path)
    data = CocoDataset(file, images)
    (images / "c.png").unlink()
    with pytest.raises(BadImageError, match=r"c\.png"):
        data.load(2)
