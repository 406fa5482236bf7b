"""The ops for distillation: public functions that check their arguments, and their specifications, `*_reference`.

A public function runs the compiled kernel for the device of its tensors, or the reference if there is none
(`_support/dispatch.py`); `use_backend` selects the reference for all ops.

A pyramid is a list of L tensors [B, C, H_l, W_l]; boxes of all images are concatenated, and image_index is the
image of each box.

Autocast: every op computes as without it. Each argument counts with the dtype that it has, half types are accumulated
in float32, and the result has the dtype that the docstring names; where two pyramids differ in dtype, the narrower one
is widened. One exception: `box_paint_conv3x3` is a convolution, so that under autocast its three operands may differ in
dtype and its result has autocast's dtype.
"""

from fastkd.ops._support.boxes import cat_boxes
from fastkd.ops._support.dispatch import use_backend
from fastkd.ops.attention_mass import attention_mass, attention_mass_reference
from fastkd.ops.box_paint import box_paint, box_paint_reference
from fastkd.ops.box_paint_conv3x3 import box_paint_conv3x3, box_paint_conv3x3_reference
from fastkd.ops.box_pool import box_pool, box_pool_reference
from fastkd.ops.imitation_mask import imitation_mask, imitation_mask_reference
from fastkd.ops.instance_attention import instance_attention, instance_attention_reference
from fastkd.ops.instance_norm_mse import instance_norm_mse, instance_norm_mse_reference
from fastkd.ops.mask_paint import mask_paint, mask_paint_reference
from fastkd.ops.mask_pool import mask_pool, mask_pool_reference
from fastkd.ops.masked_mse import masked_mse, masked_mse_reference
from fastkd.ops.norm_relu_box_pool import norm_relu_box_pool, norm_relu_box_pool_reference
from fastkd.ops.value_mimic import value_mimic, value_mimic_reference

__all__ = [
    "attention_mass",
    "attention_mass_reference",
    "box_paint",
    "box_paint_conv3x3",
    "box_paint_conv3x3_reference",
    "box_paint_reference",
    "box_pool",
    "box_pool_reference",
    "cat_boxes",
    "imitation_mask",
    "imitation_mask_reference",
    "instance_attention",
    "instance_attention_reference",
    "instance_norm_mse",
    "instance_norm_mse_reference",
    "mask_paint",
    "mask_paint_reference",
    "mask_pool",
    "mask_pool_reference",
    "masked_mse",
    "masked_mse_reference",
    "norm_relu_box_pool",
    "norm_relu_box_pool_reference",
    "use_backend",
    "value_mimic",
    "value_mimic_reference",
]
