"""LGD: label-guided self-distillation (Zhang et al., AAAI 2022; docs/methods.md section 2).

LGD computes an instructive pyramid from the ground truth and the student's features, and the student imitates it. No
pretrained teacher is needed. The steps of the method:

    gather_objects     boxes and dummy objects of a batch (lgd_objects.py)      methods 2.1
    box_descriptors    objects as vectors: box, class, mask (lgd_objects.py)    methods 2.1
    LabelEncoder       descriptors -> label embeddings                          methods 2.1
    AppearanceEncoder  student's pyramid -> appearance embeddings               methods 2.2
    RelationAdapter    attention among the objects of an image                  methods 2.3
    KnowledgeMapper    objects painted into a pyramid and refined               methods 2.4
    LGD                the complete method with its losses                                methods 2.5

Letters: B images, L levels, C channels, K objects of the whole batch; image_index is the image of each object.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastkd.distillers.lgd_objects import MASK_SIZE, Objects, box_descriptors, gather_objects
from fastkd.distillers.protocol import Distilled, Distiller
from fastkd.ops import box_paint_conv3x3, instance_norm_mse, mask_paint, mask_pool, norm_relu_box_pool
from fastkd.ops._support.checks import check_levels
from fastkd.ops._support.coverage import full_precision
from fastkd.ops._support.layout import is_channels_last
from fastkd.types import Batch

ADAPTER_QUERIES = ("appearance", "label", "appearance_only", "label_only")


class LinearNorm(nn.Module):
    """Linear, LayerNorm without affine, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        x = self.linear(x)
        return F.relu(F.layer_norm(x, x.shape[-1:]))


class TransformNet(nn.Module):
    """A size x size matrix predicted from each vector and applied to it: x -> x T(x), without added identity."""

    def __init__(self, size: int):
        super().__init__()
        widths = (size, 64, 128, 1024, 512, 256)
        self.layers = nn.Sequential(*(LinearNorm(*pair) for pair in itertools.pairwise(widths)))
        self.matrix = nn.Linear(256, size * size)

    def forward(self, x: Tensor) -> Tensor:
        """[K, size] -> [K, size]."""
        matrix = self.matrix(self.layers(x)).unflatten(1, (x.shape[1], x.shape[1]))
        return torch.einsum("ki,kij->kj", x, matrix)


class LabelEncoder(nn.Module):
    """A PointNet over the objects of one image: descriptors -> label embeddings (methods 2.1).

    Args:
        descriptor: length of a descriptor.
        channels: of a label embedding.
    """

    def __init__(self, descriptor: int, channels: int):
        super().__init__()
        self.input_transform = TransformNet(descriptor)
        self.local = LinearNorm(descriptor, 64)
        self.local_transform = TransformNet(64)
        self.expand = nn.Sequential(LinearNorm(64, 128), LinearNorm(128, 1024))
        self.embed = LinearNorm(64 + 1024, channels)

    def forward(self, descriptors: Tensor, image_index: Tensor, batch_size: int) -> Tensor:
        """[K, descriptor] and [K] -> [K, channels]."""
        local = self.local_transform(self.local(self.input_transform(descriptors)))  # [K, 64]
        features = self.expand(local)  # [K, 1024], >= 0 after ReLU, so the maximum can start at 0
        index = image_index[:, None].expand(-1, features.shape[1])
        highest = features.new_zeros(batch_size, features.shape[1]).scatter_reduce(0, index, features, "amax")
        return self.embed(torch.cat([local, highest[image_index]], dim=1))


class AppearanceEncoder(nn.Module):
    """conv3x3, GroupNorm with 1 group, ReLU, mean over the cells of each object (methods 2.2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, pyramid: Sequence[Tensor], objects: Objects, padded_size: tuple[int, int]) -> Tensor:
        """L tensors [B, C, H_l, W_l] -> appearance embeddings [L, K, C]."""
        levels = [self.conv(level) for level in pyramid]
        if objects.masks is None:
            return norm_relu_box_pool(levels, objects.boxes, objects.image_index, padded_size)
        return mask_pool([F.relu(_group_norm(level)) for level in levels], objects.masks, objects.image_index)


class RelationAdapter(nn.Module):
    """Multi-head attention among the objects of an image, level by level with shared weights (methods 2.3).

    Args:
        channels: of label and appearance embeddings.
        heads: of the attention.
        query: "appearance" (appearance attends to labels), "label" (labels attend to appearance), "appearance_only" or
            "label_only" (self-attention).
    """

    def __init__(self, channels: int, heads: int, query: str = "appearance"):
        super().__init__()
        self.query = query
        self.label = None if query == "appearance_only" else LinearNorm(channels, channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, labels: Tensor | None, appearance: Tensor | None, image_index: Tensor, levels: int) -> Tensor:
        """Label embeddings [K, C] and appearance embeddings [L, K, C] (None where unused) -> A [L, K, C]."""
        if self.label is not None:
            labels = self.label(labels).expand(levels, -1, -1)
        query = labels if self.query in ("label", "label_only") else appearance
        key = labels if self.query in ("appearance", "label_only") else appearance
        other_image = image_index[:, None] != image_index  # all images form one masked sequence
        return self.attention(query, key, key, attn_mask=other_image, need_weights=False)[0]


class KnowledgeMapper(nn.Module):
    """Maps objects to a pyramid: paint, convolve, add the context, refine (methods 2.4).

    Args:
        channels: C.
        context: the last B objects are the context objects.
        recompute: do not store activations of the refinement; recompute them in the backward pass.
    """

    def __init__(self, channels: int, context: bool, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.object = nn.Linear(channels, channels)
        self.context = nn.Linear(channels, channels) if context else None
        self.paint = nn.Conv2d(channels, channels, 3, padding=1)
        self.refine = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(
        self, related: Tensor, objects: Objects, padded_size: tuple[int, int], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """A [L, K, C] -> the instructive pyramid, L tensors of the shapes and memory format of `like`."""
        num_foreground = related.shape[1] if self.context is None else related.shape[1] - like[0].shape[0]
        with full_precision(related):
            embeddings = self.object(related[:, :num_foreground])
            contexts = None if self.context is None else self.context(related[:, num_foreground:])  # [L, B, C]
        painted = self._paint(embeddings, objects, padded_size, like)
        memory_format = torch.channels_last if is_channels_last(like[0]) else torch.contiguous_format
        return [
            _checkpoint(self.recompute, self._refine, level, context, memory_format)
            for level, context in zip(painted, [None] * len(painted) if contexts is None else contexts)
        ]

    def _paint(
        self, embeddings: Tensor, objects: Objects, padded_size: tuple[int, int], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """conv3x3 of a pyramid in which each cell is the sum of the embeddings [L, num_foreground, C] that cover it."""
        images, level_sizes = like[0].shape[0], [(level.shape[2], level.shape[3]) for level in like]
        num_foreground, conv = embeddings.shape[1], self.paint
        image_index = objects.image_index[:num_foreground]
        if objects.masks is not None:
            painted = mask_paint(embeddings, objects.masks[:num_foreground], image_index, images, level_sizes)
            return [conv(level) for level in painted]
        boxes = objects.boxes[:num_foreground]
        return box_paint_conv3x3(
            embeddings, conv.weight, conv.bias, boxes, image_index, padded_size, images, level_sizes
        )

    def _refine(self, level: Tensor, context: Tensor | None, memory_format: torch.memory_format) -> Tensor:
        """Instructive level from a painted level [B, C, H_l, W_l] and the context embeddings [B, C]."""
        if context is not None:
            level = level + context[:, :, None, None].to(level.dtype)
        level = F.relu(level).contiguous(memory_format=memory_format)
        first, second, third = self.refine
        level = F.relu(_group_norm(first(level)))
        level = F.relu(_group_norm(second(level)))
        return _group_norm(third(level))


def _group_norm(level: Tensor) -> Tensor:
    """GroupNorm with 1 group and no affine, in the level's dtype: autocast on a GPU would keep a float32 copy."""
    with full_precision(level):
        return F.group_norm(level, 1)


def _checkpoint(enabled: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments); if enabled, with activations recomputed in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


class LGD(Distiller):
    """Label-guided self-distillation: the student imitates a pyramid computed from labels and its own features.

    Args:
        num_classes: at least 1.
        channels: of the pyramid and of every embedding, divisible by heads.
        heads: of the relation adapter's attention.
        context: add one object per image, the whole image without a class (published: dense detectors).
        detach_appearance: the appearance encoder sends no gradient into the student (published: two-stage detectors).
        use_masks: objects cover their instance masks instead of their boxes; needs batch.masks.
        adapter_query: the embeddings used as queries, see `query` of `RelationAdapter`.
        weight: of the distillation loss (published: 1).
        instructive_weight: factor on the detector's loss on the instructive pyramid (published: 1). With AdamW, whose
            step size does not grow with the loss, a value below 1 lets the student's loss dominate the head's updates.
        recompute: do not store activations of the refinement and the student's adapter; recompute them in the
            backward pass.
    Source: docs/methods.md section 2.
    """

    instructs = True
    detach_fraction = 30 / 180

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        *,
        heads: int = 8,
        context: bool = True,
        detach_appearance: bool = False,
        use_masks: bool = False,
        adapter_query: str = "appearance",
        weight: float = 1.0,
        instructive_weight: float = 1.0,
        recompute: bool = False,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"LGD: num_classes must be at least 1, got {num_classes}; count the classes of the data")
        if heads < 1 or channels < 1 or channels % heads:
            raise ValueError(
                f"LGD: channels must be divisible by heads, got {channels} and {heads}; change one of them"
            )
        if adapter_query not in ADAPTER_QUERIES:
            raise ValueError(f"LGD: adapter_query must be one of {ADAPTER_QUERIES}, got {adapter_query!r}; choose one")
        for name, value in (("weight", weight), ("instructive_weight", instructive_weight)):
            if not value >= 0:
                raise ValueError(f"LGD: {name} must be at least 0, got {value}; 1 is the published value")
        self.num_classes, self.channels, self.context = num_classes, channels, context
        self.detach_appearance, self.use_masks, self.recompute = detach_appearance, use_masks, recompute
        self.weight, self.instructive_weight = weight, instructive_weight
        descriptor = 4 + num_classes + (MASK_SIZE**2 if use_masks else 0)
        self.labels = None if adapter_query == "appearance_only" else LabelEncoder(descriptor, channels)
        self.appearance = None if adapter_query == "label_only" else AppearanceEncoder(channels)
        self.relation = RelationAdapter(channels, heads, adapter_query)
        self.mapper = KnowledgeMapper(channels, context, recompute)
        self.student_adapter = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def prepare(self, batch: Batch, level_sizes: Sequence[tuple[int, int]] = ()) -> Objects:
        """The objects of a batch, gathered outside of `forward`, so that one compiled graph serves any box counts."""
        return gather_objects(batch, context=self.context, use_masks=self.use_masks)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: Objects | None = None,
    ) -> Distilled:
        """The distillation loss, and the instructive pyramid for the detector's own loss (methods 2.5).

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: images, boxes, labels, and masks where use_masks.
            teacher: unused; the labels replace it.
            detach_student: the distillation loss sends no gradient into the student (its adapter still learns).
            prepared: the result of `prepare` for this batch; None makes it here.
        Returns: {"lgd_distill": float scalar} and L tensors like student.
        Raises: ValueError or TypeError if student or batch do not fit.
        """
        check_levels("LGD", "student", student, channels=self.channels)
        instructive = self.instruct(student, batch, prepared)
        levels = [level.detach() for level in student] if detach_student else student
        adapted = [_checkpoint(self.recompute, self.student_adapter, level) for level in levels]
        loss = instance_norm_mse(adapted, [level.detach() for level in instructive])
        return Distilled({"lgd_distill": self.weight * loss}, instructive)

    def instruct(self, pyramid: Sequence[Tensor], batch: Batch, objects: Objects | None = None) -> list[Tensor]:
        """The instructive pyramid: L tensors like pyramid. The steps on objects run in float32, also under autocast."""
        objects = self.prepare(batch) if objects is None else objects
        padded_size, image_index = batch.padded_size, objects.image_index
        labels = appearance = None
        dtype = self.mapper.object.weight.dtype
        if self.labels is not None:
            with full_precision(pyramid[0]):
                descriptors = box_descriptors(objects, self.num_classes, padded_size, dtype)
                labels = self.labels(descriptors, image_index, len(batch))  # [K, C]
        if self.appearance is not None:
            levels = [level.detach() for level in pyramid] if self.detach_appearance else pyramid
            appearance = self.appearance(levels, objects, padded_size).to(dtype)  # [L, K, C]
        with full_precision(pyramid[0]):
            related = self.relation(labels, appearance, image_index, len(pyramid))  # [L, K, C]
        return self.mapper(related, objects, padded_size, pyramid)
