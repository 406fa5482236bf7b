"""Modules shared by all packages: the overlap of boxes, and atomic file writes."""

import json

import pytest
import torch
from torchvision import ops as torchvision_ops

from fastkd.boxes import box_area, box_intersection, box_iou
from fastkd.files import replacing, write_json, write_text


def boxes_of(*shape):
    corner = torch.randn(*shape, 2, dtype=torch.float64)
    return torch.cat([corner, corner + torch.rand(*shape, 2, dtype=torch.float64) * 2], -1)


def test_iou_of_all_pairs_is_torchvisions():
    boxes, others = boxes_of(7), boxes_of(5)
    torch.testing.assert_close(box_iou(boxes[:, None], others), torchvision_ops.box_iou(boxes, others))
    torch.testing.assert_close(box_area(boxes), torchvision_ops.box_area(boxes))


def test_iou_broadcasts():
    boxes, others = boxes_of(3, 7), boxes_of(3, 5)
    found = box_iou(boxes[:, :, None], others[:, None])
    assert found.shape == (3, 7, 5)
    assert torch.equal(found[1], box_iou(boxes[1][:, None], others[1]))
    assert torch.equal(box_intersection(boxes[0], boxes[0]), box_area(boxes[0]))


def test_boxes_without_area_overlap_nothing():
    empty, inverted = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0, 2.0, 2.0])
    for box in (empty, inverted):
        assert box_area(box) == 0
        assert all(box_iou(box, other) == 0 for other in (box, torch.tensor([0.0, 0.0, 5.0, 5.0])))


def test_eps_is_added_to_the_union():
    box = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert box_iou(box, box) == 1 and box_iou(box, box, eps=1.0) == 0.5


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_json_without_numbers_that_json_does_not_know(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, None]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    write_json(path, {"a": float("inf")}, allow_nan=True)
    assert json.loads(path.read_text()) == {"a": float("inf")} and list(tmp_path.iterdir()) == [path]
