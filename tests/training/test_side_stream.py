"""The teacher's stream: synchronisation between streams, and lifetime of their memory."""

import contextlib

import pytest
import torch
from detector_cases import rectangles, small_config
from ragged import priors
from torch import Tensor

from fastkd.detectors import build_detector
from fastkd.distillers import ICD
from fastkd.training.parallel.side_stream import SideStream
from fastkd.training.schedule import Phase
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """Streams that log their calls."""

    def __init__(self):
        self.log = []
        self.current = FakeStream("main", self.log)

    def Stream(self, device):
        self.log.append("new")
        return FakeStream("side", self.log)

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_streams_wait_and_memory_is_held(monkeypatch):
    cuda, image = FakeCuda(), torch.ones(2)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: cuda.log.append(f"{len(tensor)} held for {stream.name}")
    )
    side = SideStream(cuda, ("cpu",))

    def work():
        cuda.log.append(f"work on {cuda.current.name}")
        return [image.repeat(2)]

    for _ in range(2):
        finish = side.start(work, [image])
        cuda.log.append("student")
        assert finish()[0].tolist() == [1, 1, 1, 1]
    step = ["side waits for main", "work on side", "2 held for side", "student", "main waits for side"]
    step.append("4 held for main")
    assert cuda.log == ["new", *step, *step]


def test_without_streams_work_is_done_at_once():
    cuda, done = FakeCuda(), []
    finish = SideStream(cuda).start(lambda: done.append(1) or [torch.ones(1)], [torch.ones(1)])
    assert done == [1] and finish()[0].item() == 1 and not cuda.log


def test_the_teacher_is_asked_before_the_student_and_once():
    teacher, student = (build_detector(small_config("retinanet")) for _ in range(2))
    module = StepModule(student, ICD(3, priors(3), 32, heads=4), FrozenTeacher(teacher))
    asked = []
    for name, detector in (("teacher", teacher), ("student", student)):
        detector.backbone.register_forward_hook(lambda *_, name=name: asked.append(name))
    batch = rectangles([2, 1])
    module(batch, Phase())
    assert asked == ["teacher", "student"]
    module(batch, Phase(distill=False))
    assert asked == ["teacher", "student", "student"]


@pytest.mark.gpu
def test_on_a_gpu_the_losses_are_those_of_one_stream():
    device = torch.device("cuda")
    teacher, student = (build_detector(small_config("retinanet", norm="frozen_bn")) for _ in range(2))
    module = StepModule(student, ICD(3, priors(3), 32, heads=4), FrozenTeacher(teacher)).to(device)
    module.teacher.to(device, torch.contiguous_format)
    batch = rectangles([2, 1], size=(256, 256)).to(device)
    found = []
    for kinds in ((), ("cuda",)):
        module.side = SideStream(kinds=kinds)
        for _ in range(3):
            module.zero_grad()
            losses = module(batch, Phase())
            sum_losses(losses).backward()
        torch.cuda.synchronize()
        found.append((losses, [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
