"""Distillation in other training frameworks (hosts): `HostStep`, `Distillation`, and one file for each host.

The core imports only torch and numpy; a host's package is imported only by the file of its name.
"""

from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import make_batch
from fastkd.integrations.host import Attachment
from fastkd.integrations.priors import measure_priors
from fastkd.integrations.teachers import Normalization, Teacher

__all__ = ["Attachment", "Distillation", "HostStep", "Normalization", "Teacher", "make_batch", "measure_priors"]
