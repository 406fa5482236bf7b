"""FGFI: the student imitates the teacher's features near objects (Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.checks import check_pyramids
from fastkd.distillers.diagnostics import share_inside_boxes
from fastkd.distillers.protocol import Distilled, Distiller, Ratio
from fastkd.ops import imitation_mask, masked_mse
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch


class FGFI(Distiller):
    """Fine-grained feature imitation.

    loss = weight / (2 * N_p) * sum over imitation cells and channels of (adapt(student) - teacher)^2.
    A cell is an imitation cell if one of its anchors has, with some box, IoU > psi * (that box's best IoU with any
    anchor); N_p is their number.

    Args:
        anchors: L tensors [A, 4] xyxy, the anchors of the cell at the origin; a level's stride is that of
            torchvision's AnchorGenerator, (H // H_l, W // W_l) of the padded batch.
        channels: of the student's pyramid.
        teacher_channels: of the teacher's pyramid; None = as the student's.
        psi: share of a box's best IoU that an anchor must exceed, in [0, 1].
        weight: lambda.
    Source: methods 3.
    """

    needs_teacher = True

    def __init__(
        self,
        anchors: Sequence[Tensor],
        channels: int = 256,
        *,
        teacher_channels: int | None = None,
        psi: float = 0.5,
        weight: float = 0.01,
    ):
        super().__init__()
        if len(anchors) == 0:
            raise ValueError(
                "FGFI: anchors must be a list of [A, 4] tensors, one for each level, got none; "
                "use ICD or LGD for a detector without anchors"
            )
        if not 0 <= psi <= 1:
            raise ValueError(f"FGFI: psi must be in [0, 1], got {psi}; 0.5 is the published value")
        if weight < 0:
            raise ValueError(f"FGFI: weight must be at least 0, got {weight}; 0.01 is the published value")
        self.channels, self.psi, self.weight = channels, psi, weight
        self.teacher_channels = channels if teacher_channels is None else teacher_channels
        self.num_levels = len(anchors)
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors{level}", boxes.clone(), persistent=False)
        self.adapter = nn.Conv2d(channels, self.teacher_channels, 3, padding=1)
        nn.init.trunc_normal_(self.adapter.weight, std=1e-4, a=-2e-4, b=2e-4)
        assert self.adapter.bias is not None
        nn.init.zeros_(self.adapter.bias)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: None = None,
    ) -> Distilled:
        """The imitation loss of a batch.

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: images and boxes.
            teacher: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            detach_student: no gradient into the student's features (the adapter still learns).
            prepared: unused.
        Returns: losses "fgfi_imitation"; 0, with all parameters in the graph, if there are no imitation cells.
        Raises: ValueError or TypeError if the pyramids or anchors disagree.
        """
        teacher = check_pyramids("FGFI", student, teacher, self.channels, self.teacher_channels)
        if detach_student:
            student = [level.detach() for level in student]
        adapted = [F.relu(self.adapter(level)) for level in student]
        error, count = masked_mse(adapted, teacher, self.masks(student, batch))
        cells = global_mean(count)
        return Distilled({"fgfi_imitation": self.weight / 2 * error / torch.where(cells > 0, cells, 1.0)})

    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> dict[str, Ratio]:
        """Imitation error, relative to the teacher's features, and the share of imitation cells inside the boxes."""
        teacher = check_pyramids("FGFI", student, teacher, self.channels, self.teacher_channels)
        masks = self.masks(student, batch)
        error, _ = masked_mse([F.relu(self.adapter(level)) for level in student], teacher, masks)
        size, _ = masked_mse([torch.zeros_like(level) for level in teacher], teacher, masks)
        return {"imitation_error": (error, size), **share_inside_boxes(masks, batch)}

    def masks(self, pyramid: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """The imitation cells: L tensors [B, H_l, W_l] bool."""
        height, width = batch.padded_size
        sizes = [(level.shape[2], level.shape[3]) for level in pyramid]
        strides = [(height // rows, width // columns) for rows, columns in sizes]
        anchors = [self.get_buffer(f"anchors{level}") for level in range(self.num_levels)]
        return imitation_mask(batch.boxes, batch.image_index, anchors, strides, len(batch), sizes, self.psi)
