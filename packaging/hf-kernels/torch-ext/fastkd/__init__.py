"""fastkd's attention over feature pyramids: Triton kernels on a GPU, plain torch elsewhere."""

from .ops._support.dispatch import use_backend
from .ops.attention_mass import attention_mass, attention_mass_reference
from .ops.instance_attention import instance_attention, instance_attention_reference

__all__ = [
    "attention_mass",
    "attention_mass_reference",
    "instance_attention",
    "instance_attention_reference",
    "use_backend",
]
