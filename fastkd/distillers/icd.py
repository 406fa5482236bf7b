"""ICD: instances query a frozen teacher, and where they look the student imitates (Kang et al., NeurIPS 2021)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.decoder import Axes, DecoderLayer, Positions, level_axes, project_levels, xavier_linear
from fastkd.distillers.linears import Biases
from fastkd.distillers.queries import Draws, Queries, QueryEncoder, draw_queries, make_draws, mlp, prior_tables
from fastkd.ops import value_mimic
from fastkd.ops._support.checks import check_levels, check_same_sizes
from fastkd.ops._support.coverage import full_precision
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch, ClassPriors


def auxiliary_losses(outputs: Tensor, queries: Queries) -> tuple[Tensor, Tensor]:
    """Identification and localisation loss of the auxiliary task (methods 1.3).

    identification = binary cross-entropy of output 0 with "is real", averaged over valid queries;
    localisation = sum over left, top, right, bottom of |sigmoid(output) - distance from the anchor to that side| / the
    box's width or height (at least 1e-7), all normalised by the image, averaged over real queries.

    Args:
        outputs: [B, N, 5]; receives gradients.
        queries: the queries they belong to.
    Returns: two float32 scalars (float64 of float64); the second is 0 without real boxes.
    """
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    counts = global_mean(queries.totals).clamp(min=1e-30)  # without real boxes the second loss is 0
    # weights and not torch.where, whose gradient is one more mask: the outputs in the padding are finite, too
    valid, counted = (queries.weights.to(outputs) / counts[:, None, None].to(outputs)).unbind()
    scores, sides = outputs.split([1, 4], dim=2)
    real = queries.weights[1].to(outputs)
    entropy = F.binary_cross_entropy_with_logits(scores[..., 0], real, weight=valid, reduction="sum")
    corners, anchors = queries.boxes.to(outputs).unflatten(2, (2, 2)), queries.anchors.to(outputs)[:, :, None]
    targets = (corners - anchors).abs()  # [B, N, 2, 2]: left, top; right, bottom
    weight = counted[..., None] / queries.sides.to(outputs).clamp(min=1e-7)  # [B, N, 2]
    error = (sides.sigmoid().unflatten(2, (2, 2)) - targets).abs()
    return entropy, (error * weight[:, :, None]).sum()


def _tabulate_priors(module: ICD, incompatible: object) -> None:
    """After a state dict was loaded."""
    module._tabulate_priors()


@dataclass
class Prepared:
    """What ICD makes of a batch on the host: draws, and `level_axes` of the pyramid."""

    draws: Draws
    axes: Axes


class ICD(nn.Module):
    """Instance-conditional distillation.

    Args:
        num_classes: at least 1, as many as the priors have.
        priors: measured from the training set in use; saved with the module.
        channels: of the student's pyramid and of queries and values, divisible by heads.
        teacher_channels: of the teacher's pyramid; None = as the student's.
        heads: of the decoder's attention.
        layers: of the decoder; the auxiliary losses of the layers add up, the distillation losses are averaged.
        rho: fake queries per real one.
        max_queries: most queries of an image (300; published for two-stage detectors: 100).
        weight: lambda of the distillation loss (8; published for two-stage detectors: 3).
        temperature: of the attention that weights the distillation loss.
        teacher_scale: factor on the teacher's pyramid (published: 1). A head that begins with a normalised convolution
            leaves the scale of its pyramid open; large features saturate an attention that has learned nothing.
    Source: methods.md section 1.
    """

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
        if temperature <= 0:
            raise ValueError(f"ICD: temperature must be > 0, got {temperature}; 1 is the published value")
        if not teacher_scale > 0:
            raise ValueError(f"ICD: teacher_scale must be > 0, got {teacher_scale}; 1 is the published value")
        self.teacher_scale = teacher_scale
        self.channels = channels
        self.teacher_channels = channels if teacher_channels is None else teacher_channels
        self.rho, self.max_queries, self.weight, self.temperature = rho, max_queries, weight, temperature
        for name in ("frequency", "mean", "std"):
            self.register_buffer(f"prior_{name}", getattr(priors, name).clone())
        self._tabulate_priors()
        self.register_load_state_dict_post_hook(_tabulate_priors)
        self.encoder = QueryEncoder(num_classes, channels)
        self.decoder = nn.ModuleList(DecoderLayer(channels, self.teacher_channels, heads) for _ in range(layers))
        self.auxiliary = mlp(channels, channels, channels, 5)
        self.student_values = nn.ModuleList(xavier_linear(channels, channels) for _ in range(layers))
        if self.teacher_channels == channels:
            # A student that inherits the teacher's head starts in the teacher's coordinates: the same start for both
            # projections keeps it there, where independent ones would first turn its features away from that head.
            for own, layer in zip(self.student_values, self.decoder, strict=True):
                own.load_state_dict(layer.value.state_dict())

    def forward(
        self,
        student_pyramid: Sequence[Tensor],
        teacher_pyramid: Sequence[Tensor],
        batch: Batch,
        *,
        detach_student: bool = False,
        prepared: Prepared | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch: auxiliary ones that train encoder and decoder, and the one the student learns from.

        Args:
            student_pyramid: L tensors [B, channels, H_l, W_l]; receive gradients.
            teacher_pyramid: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            batch: images, boxes, labels, seeds.
            detach_student: no gradient into the student's features (its projections still learn).
            prepared: what `prepare` makes of the batch; given, no count and no seed is looked at, so that one compiled
                graph serves batches of any number of boxes.
        Returns: {"icd_identification", "icd_localisation", "icd_distill"}: float scalars.
        Raises: ValueError or TypeError if pyramids or batch do not fit.
        """
        self._check_teacher(teacher_pyramid)
        check_levels("ICD", "student_pyramid", student_pyramid, channels=self.channels)
        check_same_sizes("ICD", "student_pyramid", student_pyramid, "teacher_pyramid", teacher_pyramid)
        student = [level.detach() if detach_student else level for level in student_pyramid]
        queries = self.queries(batch, prepared and prepared.draws)
        terms, biases = [], self._biases(queries)
        layers = self._decode(queries, teacher_pyramid, batch, biases, prepared and prepared.axes)
        for projection, (decoded, attention) in zip(self.student_values, layers, strict=True):
            mass = attention.mass(queries.chosen, self.temperature)
            targets = [level.detach() for level in attention.values]
            mimic = value_mimic(project_levels(projection, student), targets, mass)  # [B, G]
            distill = mimic.sum() * (self.weight / (mimic.numel() * len(self.decoder)))
            with full_precision(decoded):
                terms.append((*auxiliary_losses(biases.apply_all(self.auxiliary, decoded), queries), distill))
        names = ("icd_identification", "icd_localisation", "icd_distill")
        return {name: functools.reduce(torch.add, layers) for name, layers in zip(names, zip(*terms, strict=True))}

    def prepare(self, batch: Batch, level_sizes: Sequence[tuple[int, int]]) -> Prepared:
        """What of `forward` depends on counts and seeds, and tables for levels (H_l, W_l) of these sizes."""
        draws = make_draws(batch, rho=self.rho, max_queries=self.max_queries)
        return Prepared(draws, level_axes(tuple(level_sizes), batch.padded_size, batch.boxes.device))

    def queries(self, batch: Batch, draws: Draws | None = None) -> Queries:
        """The batch's real queries and the fakes its seeds draw."""
        tables = (self.prior_cumulative, self.prior_sizes)
        return draw_queries(batch, *tables, rho=self.rho, max_queries=self.max_queries, draws=draws)

    def _tabulate_priors(self) -> None:
        tables = prior_tables(self.prior_frequency, self.prior_mean, self.prior_std)
        for name, table in zip(("prior_cumulative", "prior_sizes"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def attention(self, teacher_pyramid: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """The last layer's attention maps of the real queries, in the order of batch.boxes: L tensors [K, G, H_l, W_l].

        Over all levels together a map sums to 1.
        """
        self._check_teacher(teacher_pyramid)
        queries = self.queries(batch)
        *_, (_, attention) = self._decode(queries, teacher_pyramid, batch, self._biases(queries))
        place = queries.real_slots % queries.real.shape[1]
        return attention.maps(batch.image_index, place)

    def _biases(self, queries: Queries) -> Biases:
        """Of all linears that see the queries."""
        linears = [part for layers in (self.encoder.layers, self.auxiliary) for part in layers]
        linears = [part for part in linears if isinstance(part, nn.Linear)]
        return Biases(linears + [own for layer in self.decoder for own in layer.query_linears()], queries.valid.numel())

    def _decode(
        self,
        queries: Queries,
        teacher_pyramid: Sequence[Tensor],
        batch: Batch,
        biases: Biases,
        axes: Axes | None = None,
    ):
        """Yields each layer's decoded queries and attention."""
        levels = [level.detach() for level in teacher_pyramid]
        if self.teacher_scale != 1:
            levels = [level * self.teacher_scale for level in levels]
        sizes = [tuple(level.shape[2:]) for level in levels]
        positions = Positions.of(batch.image_sizes.to(levels[0].device), batch.padded_size, sizes, axes)
        with full_precision(queries.boxes):
            decoded = self.encoder(queries, biases)
        for layer in self.decoder:
            decoded, attention = layer(decoded, levels, positions, biases)
            yield decoded, attention

    def _check_teacher(self, pyramid: Sequence[Tensor]) -> None:
        check_levels("ICD", "teacher_pyramid", pyramid, channels=self.teacher_channels)
