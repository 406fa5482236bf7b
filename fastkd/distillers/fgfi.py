"""FGFI: the student's features imitate the teacher's near objects (Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.ops import imitation_mask, masked_mse
from fastkd.ops._support.checks import check_levels, check_same_sizes
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch


class FGFI(nn.Module):
    """Fine-grained feature imitation.

    loss = weight / (2 * N_p) * sum over imitating cells and channels of (adapt(student) - teacher)^2.
    A cell imitates if any of its anchors has IoU > psi * (the best IoU of all anchors) with any box; N_p = such cells.

    Args:
        channels: of the student's pyramid.
        teacher_channels: of the teacher's pyramid; None = as the student's.
        psi: share of a box's best IoU that an anchor must exceed, in [0, 1].
        weight: lambda.
    Source: methods.md section 3.
    """

    def __init__(
        self, channels: int = 256, *, teacher_channels: int | None = None, psi: float = 0.5, weight: float = 0.01
    ):
        super().__init__()
        if not 0 <= psi <= 1:
            raise ValueError(f"FGFI: psi must be in [0, 1], got {psi}; 0.5 is the published value")
        if weight < 0:
            raise ValueError(f"FGFI: weight must be at least 0, got {weight}; 0.01 is the published value")
        self.channels, self.psi, self.weight = channels, psi, weight
        self.teacher_channels = channels if teacher_channels is None else teacher_channels
        self.adapter = nn.Conv2d(channels, self.teacher_channels, 3, padding=1)
        nn.init.trunc_normal_(self.adapter.weight, std=1e-4, a=-2e-4, b=2e-4)
        nn.init.zeros_(self.adapter.bias)

    def forward(
        self,
        student_pyramid: Sequence[Tensor],
        teacher_pyramid: Sequence[Tensor],
        batch: Batch,
        anchors: Sequence[Tensor],
        *,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """The imitation loss of a batch.

        Args:
            student_pyramid: L tensors [B, channels, H_l, W_l]; receive gradients.
            teacher_pyramid: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            batch: images and boxes.
            anchors: L tensors [A, 4] xyxy, the anchors of the cell at the origin; a level's stride is that of
                torchvision's AnchorGenerator, (H // H_l, W // W_l) of the padded batch.
            scale: factor of the loss, for a warm-up.
        Returns: {"fgfi_imitation": float scalar}; 0 with every parameter in the graph when no cell imitates.
        Raises: ValueError or TypeError if the pyramids or anchors disagree.
        """
        check_levels("FGFI", "student_pyramid", student_pyramid, channels=self.channels)
        check_levels("FGFI", "teacher_pyramid", teacher_pyramid, channels=self.teacher_channels)
        check_same_sizes("FGFI", "teacher_pyramid", teacher_pyramid, "student_pyramid", student_pyramid)
        masks = self.masks(student_pyramid, batch, anchors)
        adapted = [F.relu(self.adapter(level)) for level in student_pyramid]
        error, count = masked_mse(adapted, teacher_pyramid, masks)
        cells = global_mean(count)
        return {"fgfi_imitation": scale * self.weight / 2 * error / torch.where(cells > 0, cells, 1.0)}

    def masks(self, pyramid: Sequence[Tensor], batch: Batch, anchors: Sequence[Tensor]) -> list[Tensor]:
        """The imitating cells: L tensors [B, H_l, W_l] bool."""
        height, width = batch.padded_size
        sizes = [tuple(level.shape[2:]) for level in pyramid]
        strides = [(height // rows, width // columns) for rows, columns in sizes]
        return imitation_mask(batch.boxes, batch.image_index, anchors, strides, len(batch), sizes, self.psi)
