"""LGD: features made of the labels and the student's own teach the student (Zhang et al., AAAI 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from fastkd.distillers.constants import constant, numbers
from fastkd.distillers.linears import Biases
from fastkd.distillers.towers import normed_tower, plain_tower, share
from fastkd.ops import box_paint_conv3x3, instance_norm_mse, mask_paint, mask_pool, norm_relu_box_pool
from fastkd.ops._support.checks import check_levels
from fastkd.ops._support.coverage import full_precision
from fastkd.ops._support.layout import is_channels_last
from fastkd.types import Batch

MASK_SIZE = 7
ADAPTER_QUERIES = ("appearance", "label", "appearance_only", "label_only")


@dataclass
class Objects:
    """What LGD encodes: every box of the batch, then stand-ins (context objects, or unit boxes where there is none).

    Args:
        boxes: [K, 4] xyxy pixels of the padded batch.
        labels: [K] int64, -1 = no class.
        image_index: [K] int64 in [0, B).
        slots: [K] int64, image * longest + place within the image.
        valid: [B, longest] bool, False in the padding.
        painted: how many of the objects are painted: all but the context objects.
        masks: [K, H, W] bool, or None where boxes say what is covered.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    slots: Tensor
    valid: Tensor
    painted: int
    masks: Tensor | None = None

    def pad(self, values: Tensor) -> Tensor:
        """[..., K, D] -> [..., B, longest, D], zeros in the padding."""
        flat = values.new_zeros(*values.shape[:-2], self.valid.numel(), values.shape[-1])
        return flat.index_copy(-2, self.slots, values).unflatten(-2, self.valid.shape)


@dataclass
class Places:
    """Where each object of a batch stands among the padded ones: all that needs the counts, which only the host knows.

    Args:
        slots: [K] int64, image * longest + place within the image.
        image_index: [K] int64 in [0, B).
        valid: [B, longest] bool, False in the padding.
    """

    slots: Tensor
    image_index: Tensor
    valid: Tensor


def place_objects(batch: Batch, *, context: bool, use_masks: bool) -> Places:
    """The places of a batch's objects, on its device; see `gather_objects`."""
    device, counts = batch.boxes.device, batch.counts
    if sum(counts) != batch.boxes.shape[0] or len(counts) != len(batch):
        raise ValueError(
            f"LGD: batch.counts must add up to the {batch.boxes.shape[0]} boxes of {len(batch)} images, "
            f"got {counts}; pass the boxes of each image"
        )
    if use_masks and batch.masks is None:
        raise ValueError("LGD: batch.masks must be given with use_masks, got None; load the data with masks")
    owners = list(range(len(batch))) if context else [image for image, count in enumerate(counts) if count == 0]
    longest = max(count + (image in owners) for image, count in enumerate(counts))
    places = [image * longest + place for image, count in enumerate(counts) for place in range(count)]
    places += [image * longest + counts[image] for image in owners]
    filled = [[place < count + (image in owners) for place in range(longest)] for image, count in enumerate(counts)]
    images = [image for image, count in enumerate(counts) for _ in range(count)] + owners
    return Places(
        slots=torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True),
        image_index=torch.tensor(images, dtype=torch.int64).to(device, non_blocking=True),
        valid=torch.tensor(filled, dtype=torch.bool).to(device, non_blocking=True),
    )


def gather_objects(batch: Batch, *, context: bool, use_masks: bool, places: Places | None = None) -> Objects:
    """The objects of a batch: its boxes and, behind them, the stand-ins.

    With context: one object an image, the box of the image with no class. Without: one unit box (0, 0, 1, 1) with no
    class for each image without boxes.

    A stand-in's mask holds the pixels whose centre its box contains.
    """
    if places is None:
        places = place_objects(batch, context=context, use_masks=use_masks)
    device, slots, boxes = batch.boxes.device, places.slots, batch.boxes.shape[0]
    stand_ins = slots.shape[0] - boxes
    corner = torch.ones(stand_ins, 2, device=device) if not context else batch.image_sizes.to(device).flip(1)
    masks = None
    if use_masks:
        y, x = (torch.arange(side, device=device) + 0.5 for side in batch.padded_size)
        inside = (y < corner[:, 1:])[:, :, None] & (x < corner[:, :1])[:, None, :]
        masks = torch.cat([batch.masks, inside])
    return Objects(
        boxes=torch.cat([batch.boxes.float(), F.pad(corner, (2, 0))]),  # whole numbers become float32
        labels=F.pad(batch.labels, (0, stand_ins), value=-1),
        image_index=places.image_index,
        slots=slots,
        valid=places.valid,
        painted=boxes if context else slots.shape[0],
        masks=masks,
    )


def describe(
    objects: Objects, num_classes: int, padded_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Descriptors [K, 4 + classes (+ 49 with masks)]: box / padded size, one-hot class, mask at 7x7; all in [-1, 1]."""
    sides, minus_one = _scales(padded_size, dtype, objects.boxes.device)
    box = objects.boxes.to(dtype) / sides
    parts = [box, objects.labels[:, None] == numbers(num_classes, objects.labels.device)]
    if objects.masks is not None:
        crops = []
        for masks, boxes in zip(objects.masks.split(8), objects.boxes.split(8)):  # roi_align wants masks as numbers
            index = torch.arange(boxes.shape[0], device=box.device, dtype=boxes.dtype)[:, None]
            crops.append(roi_align(masks[:, None].float(), torch.cat([index, boxes], 1), MASK_SIZE, aligned=True))
        parts.append((torch.cat(crops) >= 0.5).to(dtype).flatten(1))
    return torch.add(minus_one, torch.cat(parts, dim=1), alpha=2)  # flags became numbers


@constant
def _scales(padded_size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(W, H, W, H) of the padded batch, and -1."""
    height, width = padded_size
    sides = torch.tensor([width, height, width, height], dtype=dtype).to(device, non_blocking=True)
    return sides, torch.full((), -1.0, dtype=dtype, device=device)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


class LinearNorm(nn.Module):
    """Linear, LayerNorm without affine, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, biases: Biases | None = None) -> Tensor:
        """[..., inputs] -> [..., outputs]; biases: the linear's among others, instead of its own."""
        x = self.linear(x) if biases is None else biases.apply(self.linear, x)
        return F.relu(F.layer_norm(x, x.shape[-1:]))


class TransformNet(nn.Module):
    """A size x size matrix made of each vector and applied to it: x -> x T(x), without an identity added."""

    def __init__(self, size: int):
        super().__init__()
        widths = (size, 64, 128, 1024, 512, 256)
        self.layers = nn.Sequential(*(LinearNorm(*pair) for pair in itertools.pairwise(widths)))
        self.matrix = nn.Linear(256, size * size)

    def forward(self, x: Tensor, biases: Biases | None = None) -> Tensor:
        """[K, size] -> [K, size]; biases: of its linears, made where they are not given."""
        biases = Biases(_linears(self), len(x)) if biases is None else biases
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden, biases)
        matrix = biases.apply(self.matrix, hidden).unflatten(1, (x.shape[1], x.shape[1]))
        return torch.bmm(x[:, None], matrix).squeeze(1)


class LabelEncoder(nn.Module):
    """A PointNet over the objects of one image: descriptors -> label embeddings (methods 2.1).

    Args:
        descriptor: entries of a descriptor.
        channels: of a label embedding.
    """

    def __init__(self, descriptor: int, channels: int):
        super().__init__()
        self.input_transform = TransformNet(descriptor)
        self.local = LinearNorm(descriptor, 64)
        self.local_transform = TransformNet(64)
        self.expand = nn.Sequential(LinearNorm(64, 128), LinearNorm(128, 1024))
        self.embed = LinearNorm(64 + 1024, channels)

    def forward(self, descriptors: Tensor, objects: Objects) -> Tensor:
        """[K, descriptor] -> [K, channels]; the global feature is the maximum over the objects of the same image."""
        biases = Biases(_linears(self), len(descriptors))
        local = self.local(self.input_transform(descriptors, biases), biases)
        features = local = self.local_transform(local, biases)  # [K, 64]
        for layer in self.expand:
            features = layer(features, biases)  # [K, 1024], at least 0, as the padding is
        highest = objects.pad(features).max(dim=1).values  # [B, 1024]; of equals only those of 0, ReLU's, get nothing
        joined = torch.cat([local, highest.index_select(0, objects.image_index)], dim=1)
        return self.embed(joined, biases)


class AppearanceEncoder(nn.Module):
    """conv3x3, GroupNorm with 1 group, ReLU, mean over each object's cells (methods 2.2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, pyramid: Sequence[Tensor], objects: Objects, padded_size: tuple[int, int]) -> Tensor:
        """L tensors [B, C, H_l, W_l] -> appearance embeddings [L, K, C]."""
        levels = plain_tower(pyramid, [self.conv])
        if objects.masks is None:
            return norm_relu_box_pool(levels, objects.boxes, objects.image_index, padded_size)
        levels = [F.relu(F.group_norm(level, 1)) for level in levels]
        return mask_pool(levels, objects.masks, objects.image_index)


class RelationAdapter(nn.Module):
    """Attention among the objects of an image (methods 2.3).

    Args:
        channels: of label and appearance embeddings.
        heads: of the attention.
        query: "appearance" (asks the labels), "label" (asks the appearance), "appearance_only" or "label_only" (asks
            itself).
    """

    def __init__(self, channels: int, heads: int, query: str = "appearance"):
        super().__init__()
        self.query = query
        self.label = None if query == "appearance_only" else LinearNorm(channels, channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, labels: Tensor | None, appearance: Tensor | None, objects: Objects, levels: int) -> Tensor:
        """Label embeddings [K, C] and appearance embeddings [L, K, C] (None where unused) -> [L, K, C]."""
        if labels is not None:
            labels = self.label(labels)[None]  # [1, K, C]
        query = labels if self.query in ("label", "label_only") else appearance
        key = labels if self.query in ("appearance", "label_only") else appearance
        return self._attend(query, key, objects.image_index).expand(levels, -1, -1)

    def _attend(self, query: Tensor, key: Tensor, image_index: Tensor) -> Tensor:
        """Queries and keys [L or 1, K, C] -> [L or 1, K, C].

        The objects of all images are one sequence under a mask: nothing is padded, and the levels share keys and mask.
        """
        module, levels = self.attention, max(len(query), len(key))
        channels, heads = module.embed_dim, (module.num_heads, -1)
        weights, biases = (p.split([channels, 2 * channels]) for p in (module.in_proj_weight, module.in_proj_bias))
        query = F.linear(query, weights[0], biases[0]).unflatten(2, heads)  # [L or 1, K, G, d]
        key, value = F.linear(key, weights[1], biases[1]).chunk(2, dim=2)
        parts = (query, key.unflatten(2, heads), value.unflatten(2, heads))
        query, key, value = (part.transpose(1, 2).expand(levels, -1, -1, -1) for part in parts)
        same = (image_index[:, None] == image_index).log().to(query.dtype)  # 0, and -inf between images
        answer = F.scaled_dot_product_attention(query, key, value, same.expand(levels, 1, -1, -1))
        return module.out_proj(answer.transpose(1, 2).flatten(2))


class KnowledgeMapper(nn.Module):
    """Objects back to a pyramid: paint, convolve, add the context, refine (methods 2.4)."""

    def __init__(self, channels: int, context: bool, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.object = nn.Linear(channels, channels)
        self.context = nn.Linear(channels, channels) if context else None
        self.paint = nn.Conv2d(channels, channels, 3, padding=1)
        self.refine = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(
        self,
        related: Tensor,
        objects: Objects,
        padded_size: tuple[int, int],
        level_sizes: Sequence[tuple[int, int]],
        order: torch.memory_format = torch.contiguous_format,
    ) -> list[Tensor]:
        """A [L, K, C] -> the instructive pyramid, L tensors [B, C, H_l, W_l] in that memory order."""
        with full_precision(related):  # of all rows: fewer operators than of some of them
            embeddings, context = self.object(related), None if self.context is None else self.context(related)
        if context is not None:
            embeddings, context = embeddings[:, : objects.painted], context[:, objects.painted :]
        levels = self._painted(embeddings, objects, padded_size, level_sizes)
        return normed_tower(levels, context, self.refine, order=order, recompute=self.recompute)

    def _painted(self, embeddings, objects, padded_size, level_sizes) -> list[Tensor]:
        index, batch_size = objects.image_index[: objects.painted], objects.valid.shape[0]
        if objects.masks is None:
            boxes, conv = objects.boxes[: objects.painted], self.paint
            return box_paint_conv3x3(
                embeddings, conv.weight, conv.bias, boxes, index, padded_size, batch_size, level_sizes
            )
        painted = mask_paint(embeddings, objects.masks[: objects.painted], index, batch_size, level_sizes)
        return plain_tower(painted, [self.paint])


class LGD(nn.Module):
    """Label-guided self-distillation: labels and the student's own features make a pyramid that the student imitates.

    Args:
        num_classes: at least 1.
        channels: of the pyramid and of every embedding, divisible by heads.
        heads: of the relation adapter's attention.
        context: one more object an image, the whole image without a class (published: dense detectors).
        detach_appearance: the appearance encoder sends no gradient into the student (published: two-stage detectors).
        use_masks: instance masks instead of boxes say what an object covers; needs batch.masks.
        adapter_query: which side asks in the relation adapter, see `RelationAdapter`.
        weight: of the distillation loss (published: 1).
        instructive_weight: what the caller multiplies the detector's loss on the instructive pyramid with (published:
            1). Below 1 a head under AdamW, whose step the two losses share, follows the student.
        recompute: keep no activations inside of the branches on pyramids; the backward pass computes them again.
    Source: methods.md section 2.
    """

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
        self.detach_appearance, self.use_masks = detach_appearance, use_masks
        self.weight, self.instructive_weight = weight, instructive_weight
        descriptor = 4 + num_classes + (MASK_SIZE**2 if use_masks else 0)
        self.labels = None if adapter_query == "appearance_only" else LabelEncoder(descriptor, channels)
        self.appearance = None if adapter_query == "label_only" else AppearanceEncoder(channels)
        self.relation = RelationAdapter(channels, heads, adapter_query)
        self.recompute = recompute
        self.mapper = KnowledgeMapper(channels, context, recompute)
        self.student_adapter = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self,
        pyramid: Sequence[Tensor],
        batch: Batch,
        *,
        detach_student: bool = False,
        places: Places | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The distillation loss and the instructive pyramid, on which the caller takes the detector's own loss.

        That loss times `instructive_weight` joins the sum that trains.

        Args:
            pyramid: L tensors [B, channels, H_l, W_l] of the student; receive gradients.
            batch: images, boxes, labels, and masks where use_masks.
            detach_student: the distillation loss sends no gradient into the student (its adapter still learns).
            places: what `prepare` makes of the batch; given, no count is looked at, so that one compiled graph serves
                batches of any number of boxes.
        Returns: {"lgd_distill": float scalar} and L tensors like pyramid.
        Raises: ValueError or TypeError if pyramid or batch do not fit.
        """
        check_levels("LGD", "pyramid", pyramid, channels=self.channels)
        pyramid, levels = share(pyramid, 2)
        instructive = self.instruct(pyramid, batch, places)
        levels = [level.detach() if detach_student else level for level in levels]
        student = plain_tower(levels, self.student_adapter[::2], recompute=self.recompute)
        loss = instance_norm_mse(student, [level.detach() for level in instructive])
        return {"lgd_distill": loss if self.weight == 1 else self.weight * loss}, instructive

    def prepare(self, batch: Batch) -> Places:
        """What of `forward` depends on the counts of boxes."""
        return place_objects(batch, context=self.context, use_masks=self.use_masks)

    def instruct(self, pyramid: Sequence[Tensor], batch: Batch, places: Places | None = None) -> list[Tensor]:
        """The instructive pyramid: L tensors like pyramid."""
        objects = gather_objects(batch, context=self.context, use_masks=self.use_masks, places=places)
        labels, appearance, dtype = None, None, self.mapper.object.weight.dtype
        if self.labels is not None:
            with full_precision(pyramid[0]):  # as of few objects casting the weights would cost more than it saves
                labels = self.labels(describe(objects, self.num_classes, batch.padded_size, dtype), objects)
        if self.appearance is not None:
            levels = [level.detach() if self.detach_appearance else level for level in pyramid]
            appearance = self.appearance(levels, objects, batch.padded_size).to(dtype)
        with full_precision(pyramid[0]):
            related = self.relation(labels, appearance, objects, len(pyramid))
        order = torch.channels_last if is_channels_last(pyramid[0]) else torch.contiguous_format
        sizes = [tuple(level.shape[2:]) for level in pyramid]
        return self.mapper(related, objects, batch.padded_size, sizes, order)
