"""The ops on boxes as torchvision and mmdetection hold them: a list with one tensor an image.

Run it with `python examples/ops_on_lists.py`.
"""

import torch

from fastkd import ops

torch.manual_seed(0)
images, channels, heads, height, width = 2, 32, 4, 128, 160
level_sizes = [(16, 20), (8, 10)]
student, teacher = (
    [torch.randn(images, channels, *size, requires_grad=grad) for size in level_sizes] for grad in (True, False)
)

# torchvision: [target["boxes"] for target in targets]; mmdetection: [s.gt_instances.bboxes for s in data_samples]
targets = [{"boxes": torch.tensor([[8.0, 8.0, 64.0, 96.0], [40.0, 0.0, 120.0, 60.0]])}, {"boxes": torch.zeros(0, 4)}]
boxes, image_index = ops.cat_boxes([target["boxes"] for target in targets])  # [K, 4], [K]

# boxes and masks
pooled = ops.box_pool(student, boxes, image_index, (height, width))  # [L, K, C]
ops.norm_relu_box_pool(student, boxes, image_index, (height, width))  # [L, K, C]
painted = ops.box_paint(pooled, boxes, image_index, (height, width), images, level_sizes)  # L x [B, C, H_l, W_l]
weight, bias = torch.randn(channels, channels, 3, 3) / 17, torch.zeros(channels)
ops.box_paint_conv3x3(pooled, weight, bias, boxes, image_index, (height, width), images, level_sizes)
masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
masks[:, 16:64, 16:64] = True
ops.mask_paint(ops.mask_pool(student, masks, image_index), masks, image_index, images, level_sizes)

# losses between pyramids
loss = ops.instance_norm_mse(student, teacher)
anchors = [torch.tensor([[-16.0, -16.0, 16.0, 16.0]]), torch.tensor([[-32.0, -32.0, 32.0, 32.0]])]
cells = ops.imitation_mask(boxes, image_index, anchors, [(8, 8), (16, 16)], images, level_sizes)  # L x [B, H_l, W_l]
squared, count = ops.masked_mse(student, teacher, cells)
loss = loss + squared / count.clamp(min=1)

# attention of a few queries over a whole pyramid, without bias tables
queries = torch.randn(images, heads, 5, channels // heads) / (channels // heads) ** 0.5
key_weight = torch.randn(channels, channels) / channels**0.5
attended, logsumexp = ops.instance_attention(
    queries, teacher, key_weight, None, None, student
)  # [B, G, N, d], [B, G, N]
chosen = torch.ones(images, 5, dtype=torch.bool)
mass = ops.attention_mass(queries, teacher, key_weight, None, None, chosen, logsumexp)  # L x [B, G, H_l, W_l]
loss = loss + ops.value_mimic(student, teacher, mass).mean() + attended.square().mean() + painted[0].square().mean()
loss.backward()
print(f"loss {loss.item():.3f}")
