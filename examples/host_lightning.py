"""Lightning with distillation by one callback: python examples/host_lightning.py [DATA] [STEPS] [METHOD]"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
from host_torchvision import retinanet
from scenes import CLASSES, loader

from fastkd.integrations.lightning import attach


class Detection(pl.LightningModule):
    """The module as it was."""

    def __init__(self, backbone: str):
        super().__init__()
        self.model = retinanet(backbone, CLASSES)

    def training_step(self, batch, index):
        losses = self.model(*batch)
        self.log_dict({name: loss.detach() for name, loss in losses.items()})
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4)


def fit(module: Detection, data: str, steps: int, callbacks: list | None = None) -> None:
    trainer = pl.Trainer(max_steps=steps, callbacks=callbacks, accelerator="cpu", logger=False,
                         enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(module, loader(data))
    print({name: round(float(value), 3) for name, value in trainer.logged_metrics.items()})


def main(data: str = "scenes", steps: int = 20, method: str = "icd") -> None:
    torch.manual_seed(0)
    teacher, student = Detection("resnet34"), Detection("resnet18")
    fit(teacher, data, steps)
    teacher = None if method == "lgd" else teacher.model.eval()
    kd = attach(student.model, method, teacher=teacher, num_classes=CLASSES)
    fit(student, data, steps, [kd.callback])
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
