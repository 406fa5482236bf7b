"""Two methods on one student: combines two recipes with one method each."""

from __future__ import annotations

import dataclasses

from fastkd.training.config import Recipe
from fastkd.training.methods import Combined, LGDICDConfig

# name in recipes -> the combination, and the kinds of its methods; the last method's recipe is the base
PAIRS: dict[str, tuple[type[Combined], tuple[str, str]]] = {"lgdicd": (LGDICDConfig, ("lgd", "icd"))}


def pair_of(combined: type[Combined], first: Recipe, last: Recipe, *, name: str) -> Recipe:
    """The recipe `last` with the method of `first` added, and both optimisers and the schedule of `first`.

    Args:
        combined: the combination class, with the two methods in this order.
        first, last: recipes of the same detector and data.
        name: name of the new recipe.
    Raises: ValueError if the recipes differ in student or data, or their methods are not those of `combined`.
    """
    same = ("detector", "data", "backbone_weights", "seed")
    different = [item for item in same if getattr(first, item) != getattr(last, item)]
    if different:
        raise ValueError(
            f"pair_of: {first.name} and {last.name} must share {', '.join(same)}, got other {different}; "
            "choose recipes of one detector and data set"
        )
    method = combined.of(first.method, last.method, first.method_optimizer)
    return dataclasses.replace(last, name=name, method=method, optimizer=first.optimizer, schedule=first.schedule)
