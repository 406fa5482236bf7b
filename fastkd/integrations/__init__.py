"""Distillation inside other people's training code: `HostStep`, `Distillation`, and one file for each host.

The core imports torch and numpy alone; a host's package is imported by the file of its name and nowhere else.
"""

from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import make_batch
from fastkd.integrations.host import Attachment
from fastkd.integrations.priors import measure_priors
from fastkd.integrations.teachers import Normalization, Teacher

__all__ = ["Attachment", "Distillation", "HostStep", "Normalization", "Teacher", "make_batch", "measure_priors"]
