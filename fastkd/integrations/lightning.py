"""Lightning: a callback for a detector inside a LightningModule.

kd = attach(module.model, method="icd", teacher=teacher, num_classes=10)
trainer = Trainer(..., callbacks=[kd.callback])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

from fastkd.integrations.hooks import check_trained, warn_of_fresh_method
from fastkd.integrations.host import Attachment


class DistillationCallback(pl.Callback):
    """Steps, logs, saves and resumes an attachment; its state is in Lightning's checkpoint under "callbacks".

    Args:
        attachment: attachment to the detector in the LightningModule.
    """

    def __init__(self, attachment: Attachment):
        self.attachment = attachment
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets the run's length.

        Raises: ValueError if the Trainer trains another model, or its strategy is not supported.
        """
        check_trained(trainer.strategy.model, self.attachment.model)
        missing = "its checkpoint has no state of DistillationCallback"
        warn_of_fresh_method(self.attachment.distillation.steps, trainer.global_step, missing)
        total = trainer.estimated_stepping_batches
        self.attachment.distillation.total_steps = int(total) if total != float("inf") else None
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Steps after each step of the optimiser, and logs the losses as fastkd/<name>."""
        if trainer.global_step > self._steps:
            self.attachment.step()
            self._steps = trainer.global_step
        for name, value in self.attachment.losses.items():
            pl_module.log(f"fastkd/{name}", value)

    def state_dict(self) -> dict[str, Any]:
        """The state for Lightning's checkpoint."""
        return self.attachment.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from Lightning's checkpoint."""
        self.attachment.load_state_dict(state_dict)


def attach(model: nn.Module, method: Any = "icd", **options: Any) -> Attachment:
    """Attaches to a torchvision or transformers detector; pass `callback` of the result to the Trainer.

    Args:
        model: the detector, a submodule of the LightningModule.
        method, **options: as in `attach` of fastkd.integrations.torchvision and fastkd.integrations.transformers.
    """
    attach_to: Callable[..., Attachment]
    if hasattr(model, "config") and hasattr(model, "model"):
        from fastkd.integrations.transformers import attach as attach_to
    else:
        from fastkd.integrations.torchvision import attach as attach_to
    kd: Any = attach_to(model, method, **options)
    kd.callback = DistillationCallback(kd)
    return kd
