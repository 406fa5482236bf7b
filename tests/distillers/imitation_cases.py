"""Shared by the tests of PKD, CWD and score-weighted L2: cases, and comparison with a float64 transcription."""

import copy

import pytest
import torch
from ragged import gradients, ragged_batch, ragged_pyramid

COUNTS = [(3, 0, 2), (0, 0), (1,)]  # boxes of the images: ragged, none, one image whose last level is one cell
# type -> tolerance, relative to the loss and to the largest entry of all gradients
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def pyramids(images, channels, teacher_channels, dtype):
    """A student's pyramid that requires gradients, and a teacher's."""
    student = ragged_pyramid(images, channels, seed=0, dtype=dtype)
    teacher = [level.detach() for level in ragged_pyramid(images, teacher_channels, seed=1, dtype=dtype)]
    return student, teacher


def double(levels):
    """The same values in float64, without history."""
    return [level.detach().double() for level in levels]


def assert_follows(module, transcription, student, teacher, batch, **options):
    """A distiller's loss and gradients are those of a transcription in float64, up to the rounding of its type.

    Args:
        transcription: (module, student, teacher, **options) -> loss; computes in the type of its arguments.
    """
    (made,) = module(student, batch, teacher, **options).losses.values()
    assert made.dtype == (torch.float64 if student[0].dtype == torch.float64 else torch.float32)
    exact_module, exact_student = copy.deepcopy(module).double(), [level.requires_grad_() for level in double(student)]
    exact_options = {name: double(levels) for name, levels in options.items()}
    exact = transcription(exact_module, exact_student, double(teacher), **exact_options)
    tolerance = DTYPES[student[0].dtype]
    assert abs(float(made.detach()) - float(exact.detach())) <= tolerance * float(exact.detach())
    found, wanted = gradients(made, module, student), gradients(exact, exact_module, exact_student)
    largest = max(float(grad.abs().max()) for grad in wanted.values())  # some vanish but for rounding: biases, one cell
    for name, grad in wanted.items():
        error = float((found[name].double() - grad).abs().max())
        assert error <= tolerance * largest, f"{name}: error {error:.2e} of {largest:.2e}"


def assert_refuses(build, message_of_weight):
    """The errors common to all three."""
    module = build()
    student, teacher = pyramids(2, 8, 8, torch.float32)
    batch = ragged_batch((1, 2))
    name = type(module).__name__
    with pytest.raises(ValueError, match=f"{name}: teacher must be given, got None"):
        module(student, batch)
    options = {"scores": [level[:, :1] for level in teacher]} if module.needs_scores else {}
    with pytest.raises(ValueError, match=f"{name}: student"):
        module([level[:, :4] for level in student], batch, teacher, **options)
    with pytest.raises(ValueError, match=f"{name}: teacher"):
        module(student, batch, teacher[:-1], **options)
    with pytest.raises(ValueError, match=message_of_weight):
        build(weight=-1.0)
