"""Recipe types for the command-line parser, with the fields of the recipe's method."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastkd.training.config import Recipe


def typed(recipe: Recipe) -> Recipe:
    """The same recipe as a subclass of Recipe that annotates `method` with the class of this recipe's method.

    tyro makes the options from annotations, and `Method`, the annotation in `Recipe`, has no fields.
    """
    field = ("method", type(recipe.method), dataclasses.field(default=None))
    subclass = dataclasses.make_dataclass("Recipe", [field], bases=(Recipe,), frozen=True)
    subclass.__doc__ = Recipe.__doc__
    return subclass(**_values(recipe))


def untyped(recipe: Recipe) -> Recipe:
    """The same recipe as a plain `Recipe`."""
    return Recipe(**_values(recipe))


def with_detector(recipe: Recipe, name: str) -> Recipe:
    """The recipe for a student of one's own; weights for the backbone of another are left out.

    Args:
        name: "module:Class", as `fastkd.detectors.use_detector` returns it.
    """
    if recipe.detector.custom == name:
        return recipe
    detector = dataclasses.replace(recipe.detector, custom=name)
    return dataclasses.replace(recipe, detector=detector, backbone_weights=None)


def _values(recipe: Recipe) -> dict[str, Any]:
    return {item.name: getattr(recipe, item.name) for item in dataclasses.fields(Recipe)}
