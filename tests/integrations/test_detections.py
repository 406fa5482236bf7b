"""A teacher's detections on a batch: boxes in pixels of the image, labels from 0, whatever the package's format."""

import types

import torch
from torch import nn

from fastkd.integrations.detections import DetectTransformers, DetectUltralytics
from fastkd.integrations.teachers import Normalization

BOX, LABEL, SCORE = [12.0, 8.0, 36.0, 40.0], 2, 0.75
IMAGE = torch.full((3, 48, 70), 0.5)


class Recorder(nn.Module):
    """Returns an output that was given, and keeps its input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, pixel_values):
        self.images = pixel_values
        return self.output


def check(found):
    ((boxes, labels, scores),) = found
    best = scores.argmax()
    torch.testing.assert_close(boxes[best], torch.tensor(BOX))
    torch.testing.assert_close(scores[best], torch.tensor(SCORE))
    assert labels[best] == LABEL and labels.dtype == torch.int64


def test_transformers_boxes_are_fractions_of_the_padded_image():
    """[70, 48] is padded to [96, 64]."""
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 1, LABEL] = torch.tensor(SCORE).logit()
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [24 / 96, 24 / 64, 24 / 96, 32 / 64]]])
    recorder = Recorder(types.SimpleNamespace(logits=logits, pred_boxes=boxes))
    check(DetectTransformers(recorder, Normalization((0.5,) * 3, (0.25,) * 3))([IMAGE]))
    assert recorder.images.shape == (1, 3, 64, 96) and not recorder.images.any()


def test_both_formats_of_ultralytics():
    many = torch.zeros(1, 7, 5)
    many[0, :, 3] = torch.tensor([24.0, 24, 24, 32, 0, 0, SCORE])
    head = types.SimpleNamespace(end2end=False, nc=3)
    check(DetectUltralytics(Recorder((many, None)), head)([IMAGE]))
    one = torch.zeros(1, 4, 6)
    one[0, 2] = torch.tensor([*BOX, SCORE, LABEL])
    check(DetectUltralytics(Recorder((one, None)), types.SimpleNamespace(end2end=True))([IMAGE]))
