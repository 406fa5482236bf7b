"""ICD: instance queries attend to a frozen teacher; the student imitates where they attend (NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.decoder import Attention, DecoderLayer, position_embeddings, project_cells, xavier_linear
from fastkd.distillers.diagnostics import cell_overlap
from fastkd.distillers.protocol import Distilled, Distiller, Ratio
from fastkd.distillers.queries import Queries, QueryEncoder, QueryNoise, draw_queries, make_noise, mlp
from fastkd.ops import value_mimic
from fastkd.ops._support.checks import check_levels, check_same_sizes
from fastkd.ops._support.coverage import full_precision, widen
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch, ClassPriors

MEASURED_INSTANCES = 8  # whose attention the diagnostics compute: each takes a copy of its image's pyramid


def auxiliary_losses(outputs: Tensor, queries: Queries) -> tuple[Tensor, Tensor]:
    """Identification and localisation losses of the auxiliary task (methods 1.3).

    identification = binary cross-entropy of output 0 with "is real", averaged over valid queries;
    localisation = L1 between sigmoid(outputs 1-4) and the distances from the anchor point to the box's left, top,
    right, bottom, each divided by the box's width or height (at least 1e-7), summed, averaged over real queries.

    Args:
        outputs: [B, N, 5]; receives gradients.
        queries: the queries of these outputs.
    Returns: two float32 scalars (float64 of float64); the second is 0 without real boxes.
    """
    outputs = widen(outputs)
    valid, real = queries.valid.to(outputs), queries.real.to(outputs)  # [B, N]; boolean indexing would synchronise
    num_valid, num_real = global_mean(torch.stack([valid.sum(), real.sum()]))
    scores, ltrb = outputs[..., 0], outputs[..., 1:].sigmoid()

    entropy = F.binary_cross_entropy_with_logits(scores, real, weight=valid, reduction="sum")

    boxes, anchors = queries.boxes.to(outputs), queries.anchors.to(outputs)
    target = torch.cat([anchors - boxes[..., :2], boxes[..., 2:] - anchors], dim=2)  # [B, N, 4]
    wh = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-7)
    error = ((ltrb - target).abs() / wh.repeat(1, 1, 2)).sum(2)  # [B, N]
    return entropy / num_valid, (error * real).sum() / torch.where(num_real > 0, num_real, 1.0)


class ICD(Distiller):
    """Instance-conditional distillation.

    Args:
        num_classes: at least 1; equal to that of the priors.
        priors: class priors of the training set; saved with the module.
        channels: of the student's pyramid and of queries and values, divisible by heads.
        teacher_channels: of the teacher's pyramid; None = as the student's.
        heads: of the decoder's attention.
        layers: of the decoder; auxiliary losses are summed over the layers, distillation losses averaged.
        rho: fake queries per real one.
        max_queries: maximum number of queries per image (300; published for two-stage detectors: 100).
        weight: lambda of the distillation loss (8; published for two-stage detectors: 3).
        temperature: of the attention that weights the distillation loss.
        teacher_scale: factor on the teacher's pyramid (published: 1). If the head normalises its first convolution, the
            scale of the pyramid is arbitrary, and large features saturate the attention at initialisation.
    Source: methods 1.
    """

    needs_teacher = True
    clip_norm = 0.01
    prior_frequency: Tensor
    prior_mean: Tensor
    prior_std: Tensor

    def __init__(
        self,
        num_classes: int,
        priors: ClassPriors,
        channels: int = 256,
        *,
        teacher_channels: int | None = None,
        heads: int = 8,
        layers: int = 1,
        rho: float = 5,
        max_queries: int = 300,
        weight: float = 8.0,
        temperature: float = 1.0,
        teacher_scale: float = 1.0,
    ):
        super().__init__()
        if num_classes < 1 or priors.num_classes != num_classes:
            raise ValueError(
                f"ICD: num_classes must be at least 1 and that of the priors ({priors.num_classes}), "
                f"got {num_classes}; measure the priors on the same data"
            )
        if heads < 1 or channels < 1 or channels % heads:
            raise ValueError(
                f"ICD: channels must be divisible by heads, got {channels} and {heads}; change one of them"
            )
        for name, value, lowest in (
            ("layers", layers, 1),
            ("max_queries", max_queries, 1),
            ("rho", rho, 0),
            ("weight", weight, 0),
        ):
            if value < lowest:
                raise ValueError(f"ICD: {name} must be at least {lowest}, got {value}; raise it")
        for name, value in (("temperature", temperature), ("teacher_scale", teacher_scale)):
            if not value > 0:
                raise ValueError(f"ICD: {name} must be > 0, got {value}; 1 is the published value")
        self.channels = channels
        self.teacher_channels = channels if teacher_channels is None else teacher_channels
        self.rho, self.max_queries, self.weight = rho, max_queries, weight
        self.temperature, self.teacher_scale = temperature, teacher_scale
        for name in ("frequency", "mean", "std"):
            self.register_buffer(f"prior_{name}", getattr(priors, name).clone())
        self.encoder = QueryEncoder(num_classes, channels)
        self.decoder = nn.ModuleList(DecoderLayer(channels, self.teacher_channels, heads) for _ in range(layers))
        self.auxiliary = mlp(channels, channels, channels, 5)
        self.student_values = nn.ModuleList(xavier_linear(channels, channels) for _ in range(layers))
        if self.teacher_channels == channels:
            # A student that inherits the teacher's head starts with features that fit this head. Equal initial
            # projections keep them; independent ones would first pull the student's features away from the head.
            for projection, layer in zip(self.student_values, self.decoder, strict=True):
                assert isinstance(layer, DecoderLayer)
                projection.load_state_dict(layer.value.state_dict())

    def prepare(self, batch: Batch, level_sizes: Sequence[tuple[int, int]]) -> QueryNoise:
        """Noise and padding of the batch's queries, built on the host from its counts and seeds."""
        return make_noise(batch, rho=self.rho, max_queries=self.max_queries)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: QueryNoise | None = None,
    ) -> Distilled:
        """The auxiliary losses, which train encoder and decoder, and the distillation loss, which trains the student.

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: images, boxes, labels, seeds.
            teacher: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            detach_student: no gradient into the student's features (their projection still learns).
            prepared: the result of `prepare` for this batch; None makes it here.
        Returns: losses "icd_identification", "icd_localisation" and "icd_distill".
        Raises: ValueError or TypeError if pyramids or batch do not fit.
        """
        teacher = self.teacher_levels(teacher)
        check_levels("ICD", "student", student, channels=self.channels)
        check_same_sizes("ICD", "student", student, "teacher", teacher)
        if detach_student:
            student = [level.detach() for level in student]
        queries = self.queries(batch, prepared)
        identification, localisation, distill = [], [], []
        for layer, (decoded, attention) in enumerate(self.decode(queries, teacher, batch)):
            with full_precision(decoded):
                real_or_fake, ltrb_error = auxiliary_losses(self.auxiliary(decoded), queries)
            mass = attention.mass(queries.mass_mask, self.temperature)
            projection = self.student_values[layer]
            assert isinstance(projection, nn.Linear)
            values = project_cells(projection, student)
            identification.append(real_or_fake)
            localisation.append(ltrb_error)
            distill.append(value_mimic(values, attention.values, mass).mean())  # mean over [B, G]
        return Distilled(
            {
                "icd_identification": torch.stack(identification).sum(),
                "icd_localisation": torch.stack(localisation).sum(),
                "icd_distill": self.weight * torch.stack(distill).mean(),
            }
        )

    def queries(self, batch: Batch, noise: QueryNoise | None = None) -> Queries:
        """The batch's real queries and the fake queries drawn from its seeds."""
        noise = self.prepare(batch, []) if noise is None else noise
        return draw_queries(batch, noise, ClassPriors(self.prior_frequency, self.prior_mean, self.prior_std))

    def decode(self, queries: Queries, levels: Sequence[Tensor], batch: Batch) -> Iterator[tuple[Tensor, Attention]]:
        """Yields each layer's decoded queries [B, N, C] and attention; `levels` are those of `teacher_levels`."""
        level_sizes = [(level.shape[2], level.shape[3]) for level in levels]
        positions = position_embeddings(batch.image_sizes.to(levels[0].device), batch.padded_size, level_sizes)
        with full_precision(queries.boxes):
            decoded = self.encoder(queries)
        for layer in self.decoder:
            decoded, attention = layer(decoded, levels, positions)
            yield decoded, attention

    @torch.no_grad()
    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: QueryNoise | None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> dict[str, Ratio]:
        """Imitation error, and the share of the last layer's attention inside the box of its own instance."""
        queries = self.queries(batch, prepared)
        errors, with_boxes = [], batch.boxes.new_zeros(())
        layers = self.decode(queries, self.teacher_levels(teacher), batch)
        for projection, (_, attention) in zip(self.student_values, layers):
            assert isinstance(projection, nn.Linear)
            mass = attention.mass(queries.mass_mask, self.temperature)
            error = value_mimic(project_cells(projection, student), attention.values, mass)  # [B, G], 0 without boxes
            errors.append(error.sum() / 2)  # half the squared distance of normalised values is 1 - their correlation
            with_boxes = with_boxes + queries.real.any(1).sum() * error.shape[1]
        rows = torch.arange(len(batch.boxes), device=batch.boxes.device)
        rows = rows[:: max(1, -(-len(rows) // MEASURED_INSTANCES))]
        maps = attention.maps(batch.image_index[rows], queries.real_index[rows] % queries.real.shape[1])
        inside, area = _inside_own_box(maps, batch, rows)
        number = torch.full_like(area, len(rows))
        return {
            "imitation_error": (torch.stack(errors).sum(), with_boxes),
            "inside_boxes": (inside, number),
            "inside_if_even": (area, number),
        }

    @torch.no_grad()
    def attention(self, teacher: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """The last layer's attention maps of the real queries, in the order of batch.boxes: L tensors [K, G, H_l, W_l].

        Summed over all levels a map is 1.
        """
        queries = self.queries(batch)
        *_, (_, attention) = self.decode(queries, self.teacher_levels(teacher), batch)
        return attention.maps(batch.image_index, queries.real_index % queries.real.shape[1])

    def teacher_levels(self, teacher: Sequence[Tensor] | None) -> list[Tensor]:
        """The levels to which the queries attend: the teacher's, checked, without gradient, times `teacher_scale`."""
        if teacher is None:
            raise ValueError("ICD: teacher must be given, got None; pass the frozen teacher's pyramid")
        check_levels("ICD", "teacher", teacher, channels=self.teacher_channels)
        levels = [level.detach() for level in teacher]
        return levels if self.teacher_scale == 1 else [level * self.teacher_scale for level in levels]


def _inside_own_box(maps: Sequence[Tensor], batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over instances: the share of attention inside its box (mean over the heads), its box's share of the image.

    Args:
        maps: L tensors [K, G, H_l, W_l], each map's sum over all levels being 1.
        batch: images and boxes.
        rows: [K], the rows of the instances in batch.boxes.
    """
    boxes = batch.boxes[rows]
    shares = [
        (level * cell_overlap(boxes, batch.padded_size, level.shape[2:])[:, None]).sum((1, 2, 3)) / level.shape[1]
        for level in maps
    ]
    image_area = batch.image_sizes.to(boxes.device)[batch.image_index[rows]].prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / image_area
    return torch.stack(shares).sum(), area.sum()
