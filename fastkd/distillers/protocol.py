"""What every method of distillation answers to, so that trainers and integrations never ask which one they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.types import Batch


@dataclass
class Distilled:
    """What a distiller makes of one step.

    Args:
        losses: weighted float scalars by name; their sum trains.
        instructive: a pyramid like the student's, on which the caller takes the detector's own loss, weighted by the
            distiller's `instructive_weight` (LGD); None of methods that have none.
    """

    losses: dict[str, Tensor]
    instructive: list[Tensor] | None = None


class Distiller(nn.Module):
    """A method of distillation: pyramids and ground truth in, losses out. It knows no detector, data set or recipe.

    A subclass implements `forward`. It imports torch alone, holds no teacher, and registers whatever it trains.

    Attributes:
        needs_teacher: whether `forward` must be given the teacher's pyramid.
        needs_scores: whether `forward` must also be given `scores`, L tensors [B, 1, H_l, W_l] in [0, 1]: the teacher's
            highest class probability in each cell. Only such a distiller has this keyword argument.
        detach_fraction: first part of a run in which callers should pass `detach_student`, as published.
        clip_norm: to which callers should clip the gradients of its own parameters, as published.
        instructive_weight: factor of the detector's loss on `Distilled.instructive`.
    """

    needs_teacher: bool = False
    needs_scores: bool = False
    detach_fraction: float = 1 / 90
    clip_norm: float = 1.0
    instructive_weight: float = 1.0

    def prepare(self, batch: Batch, level_sizes: Sequence[tuple[int, int]]) -> Any:
        """What `forward` needs of the batch's counts and seeds, made on the host; None if it needs nothing.

        A caller that compiles `forward` passes the result on, so that one graph serves any number of boxes.

        Args:
            batch: as of `forward`.
            level_sizes: (H_l, W_l) of the student's levels.
        """
        return None

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: Any = None,
    ) -> Distilled:
        """The losses of a step.

        Args:
            student: L tensors [B, C, H_l, W_l]; receive gradients.
            batch: images and ground truth; boxes in pixels of the padded batch.
            teacher: L tensors [B, C_teacher, H_l, W_l] of the same images; frozen. None if `needs_teacher` is False.
            detach_student: the distillation loss sends no gradient into `student`; the distiller still learns.
            prepared: the result of `prepare` for this batch; None makes it here.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward must be implemented")
