"""LGD as one writes it from the paper in plain torch: what `benchmarks.step` compares with.

Eager, level by level, covers of boxes as masks, pooling and painting as products with them. It computes with the
parameters of an `LGD`, so that tests can ask for equal losses. Every image has the same number of boxes here, and a
context object.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ops import peers
from fastkd.distillers import LGD
from fastkd.distillers.lgd import LinearNorm, TransformNet
from fastkd.types import Batch


def _linear_norm(layer: LinearNorm, x: Tensor) -> Tensor:
    x = layer.linear(x)
    return F.relu(F.layer_norm(x, x.shape[-1:]))


def _transform(net: TransformNet, x: Tensor) -> Tensor:
    """[B, N, D] times the D x D matrix made of each vector."""
    hidden = x
    for layer in net.layers:
        hidden = _linear_norm(layer, hidden)
    matrix = net.matrix(hidden).unflatten(2, (x.shape[2], x.shape[2]))
    return (x[:, :, None] @ matrix)[:, :, 0]


class PlainLGD(nn.Module):
    """`LGD`'s forward in plain torch.

    Args:
        lgd: whose parameters it uses; with or without a context object, without masks.
    """

    def __init__(self, lgd: LGD):
        super().__init__()
        self.lgd = lgd

    def forward(self, pyramid: list[Tensor], batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The distillation loss and the instructive pyramid."""
        instructive = self.instruct(pyramid, batch)
        adapted = [self.lgd.student_adapter(level) for level in pyramid]
        loss = peers.instance_norm_mse(adapted, [level.detach() for level in instructive])
        return {"lgd_distill": self.lgd.weight * loss}, instructive

    def instruct(self, pyramid: list[Tensor], batch: Batch) -> list[Tensor]:
        """The instructive pyramid."""
        images, image_size = len(batch), batch.padded_size
        boxes, labels = batch.boxes.unflatten(0, (images, -1)), batch.labels.unflatten(0, (images, -1))
        one_hot = F.one_hot(labels, self.lgd.num_classes).float()
        if self.lgd.context:
            corner = batch.image_sizes.flip(1).float()
            whole = torch.cat([torch.zeros_like(corner), corner], dim=1)
            boxes = torch.cat([boxes, whole[:, None]], dim=1)  # [B, N, 4]
            one_hot = torch.cat([one_hot, torch.zeros_like(one_hot[:, :1])], dim=1)
        embeddings = self.label_embeddings(boxes, one_hot, image_size)
        flat, related, painted = boxes.flatten(0, 1), [], []
        keys = _linear_norm(self.lgd.relation.label, embeddings)
        for level in pyramid:
            cover = peers.box_cover(flat, image_size, level.shape[2:])
            appearance = self.appearance(level.detach() if self.lgd.detach_appearance else level, cover)
            related.append(self.lgd.relation.attention(appearance, keys, keys, need_weights=False)[0])
        for level, answer in zip(pyramid, related):
            painted.append(self.paint(answer, boxes, image_size, level.shape[2:]))
        return [self.refine(level) for level in painted]

    def label_embeddings(self, boxes: Tensor, one_hot: Tensor, image_size: tuple[int, int]) -> Tensor:
        """PointNet over the objects of each image: [B, N, C]."""
        height, width = image_size
        scaled = boxes / boxes.new_tensor([width, height, width, height])
        encoder = self.lgd.labels
        x = _transform(encoder.input_transform, torch.cat([scaled, one_hot], dim=2) * 2 - 1)
        local = _transform(encoder.local_transform, _linear_norm(encoder.local, x))
        features = local
        for layer in encoder.expand:
            features = _linear_norm(layer, features)
        highest = features.amax(dim=1, keepdim=True).expand(-1, local.shape[1], -1)
        return _linear_norm(encoder.embed, torch.cat([local, highest], dim=2))

    def appearance(self, level: Tensor, cover: Tensor) -> Tensor:
        """Mean of the encoded level over each object's cells: [B, N, C]."""
        encoded = F.relu(F.group_norm(self.lgd.appearance.conv(level), 1))
        return peers.pool([encoded], [cover])[0].unflatten(0, (level.shape[0], -1))

    def paint(self, answer: Tensor, boxes: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Objects [B, N, C] back to a level, convolved, the context added: [B, C, H_l, W_l]."""
        mapper, images = self.lgd.mapper, len(boxes)
        count = boxes.shape[1] - (mapper.context is not None)
        cover = peers.box_cover(boxes[:, :count].flatten(0, 1), image_size, size)
        level = mapper.paint(peers.paint(mapper.object(answer[:, :count]).flatten(0, 1)[None], [cover], images)[0])
        if mapper.context is not None:
            level = level + mapper.context(answer[:, count])[:, :, None, None]
        return F.relu(level)

    def refine(self, level: Tensor) -> Tensor:
        """Three convolutions with norms."""
        first, second, last = self.lgd.mapper.refine
        level = F.relu(F.group_norm(first(level), 1))
        level = F.relu(F.group_norm(second(level), 1))
        return F.group_norm(last(level), 1)
