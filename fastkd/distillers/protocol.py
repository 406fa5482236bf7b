"""The interface of distillation methods, so that trainers and integrations need not know the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.types import Batch

# A figure as a sum and the number it is divided by, float scalars: both are added over processes and micro-batches.
Ratio = tuple[Tensor, Tensor]


@dataclass
class Distilled:
    """The result of a distiller for one step.

    Args:
        losses: weighted float scalars by name; training minimises their sum.
        instructive: a pyramid like the student's, on which the caller computes the detector's loss, weighted by the
            distiller's `instructive_weight` (LGD); None for methods without one.
    """

    losses: dict[str, Tensor]
    instructive: list[Tensor] | None = None


class Distiller(nn.Module):
    """A method of distillation: pyramids and ground truth in, losses out; independent of detector, data set and recipe.

    A subclass implements `forward`, imports only torch, holds no teacher, and registers all trainable modules.

    Attributes:
        needs_teacher: whether `forward` must be given the teacher's pyramid.
        needs_scores: whether `forward` must also be given `scores`, L tensors [B, 1, H_l, W_l] in [0, 1]: the teacher's
            highest class probability in each cell. Only such a distiller has this keyword argument.
        instructs: whether `forward` returns an instructive pyramid, which `instruct` then computes alone.
        detach_fraction: initial fraction of a run with `detach_student`, as published; set by the caller.
        clip_norm: norm to which the caller should clip the gradients of the distiller's parameters, as published.
        instructive_weight: factor on the detector's loss on `Distilled.instructive`.
    """

    needs_teacher: bool = False
    needs_scores: bool = False
    instructs: bool = False
    detach_fraction: float = 1 / 90
    clip_norm: float = 1.0
    instructive_weight: float = 1.0

    def prepare(self, batch: Batch, level_sizes: Sequence[tuple[int, int]]) -> Any:
        """Inputs of `forward` that depend on the batch's counts and seeds, built on the host; None if there are none.

        A caller that compiles `forward` passes the result to it, so that one graph serves any number of boxes.

        Args:
            batch: as in `forward`.
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

    def instruct(self, pyramid: Sequence[Tensor], batch: Batch, objects: Any = None) -> list[Tensor]:
        """The instructive pyramid, L tensors like the student's `pyramid`; only where `instructs` is True.

        Args:
            objects: the result of `prepare` for this batch; None makes it here.
        """
        raise NotImplementedError(f"{type(self).__name__}.instruct must be implemented")

    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: Any = None,
        scores: Sequence[Tensor] | None = None,
    ) -> dict[str, Ratio]:
        """How well the method teaches, by name (methods 9); called without gradients in the steps that are logged.

        The names must not depend on the batch: a figure that no object defines is (0, 0).

        Args:
            student, batch, teacher, prepared: as in `forward`.
            scores: as in `forward`, where `needs_scores` is True.
        """
        return {}
