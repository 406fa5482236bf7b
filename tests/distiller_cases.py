"""The three distillers on one small batch, for tests of execution rather than of results."""

import torch
from ragged import LEVELS, priors, ragged_batch, ragged_pyramid

from fastkd.distillers import FGFI, ICD, LGD

CHANNELS, CLASSES = 8, 3
ANCHORS = [torch.tensor([[-s, -s, s, s], [-s, -2 * s, s, 2 * s]]) for s in (4.0, 8.0, 16.0, 32.0)]
NAMES = ["lgd", "lgd masks", "icd", "fgfi"]


def build(name):
    """A distiller; weights by torch's global seed."""
    if name == "icd":
        return ICD(CLASSES, priors(CLASSES), CHANNELS, heads=4)
    if name == "fgfi":
        return FGFI(ANCHORS, CHANNELS)
    return LGD(CLASSES, CHANNELS, heads=2, use_masks=name == "lgd masks", context=name == "lgd")


def losses(name, module, student, teacher, batch):
    """The distiller's losses; LGD's instructive pyramid is left out."""
    return module(student, batch, teacher).losses


def inputs(counts=(3, 0, 2), *, levels=LEVELS, **options):
    """Student pyramid, teacher pyramid and batch with len(counts) images."""
    student, teacher = (
        ragged_pyramid(len(counts), CHANNELS, levels=levels, seed=seed, dtype=torch.float32) for seed in (0, 1)
    )
    return student, [level.detach() for level in teacher], ragged_batch(counts, masks=True, **options)
