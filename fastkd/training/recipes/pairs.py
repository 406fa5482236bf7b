"""LGD and ICD on one student: a recipe made of the two recipes that have one of them each."""

from __future__ import annotations

import dataclasses

from fastkd.training.config import LGDICDConfig, Recipe


def pair_of(lgd: Recipe, icd: Recipe) -> Recipe:
    """ICD's recipe with LGD added, on LGD's schedule (the longer of the published two).

    Args:
        lgd, icd: recipes of the same detector and data, named ...-lgd and ...-icd.
    Raises: ValueError if they differ in what the student is or sees.
    """
    same = ("detector", "data", "backbone_weights", "seed")
    different = [name for name in same if getattr(lgd, name) != getattr(icd, name)]
    if different or lgd.lgd is None or icd.icd is None:
        raise ValueError(f"pair_of: {lgd.name} and {icd.name} must share {', '.join(same)}, got other {different}")
    method = LGDICDConfig(lgd=lgd.lgd, icd=icd.icd, lgd_optimizer=lgd.method_optimizer)
    name = icd.name.removesuffix("-icd") + "-lgdicd"
    return dataclasses.replace(icd, name=name, method=method, optimizer=lgd.optimizer, schedule=lgd.schedule)
