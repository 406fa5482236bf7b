"""Distillation by one Lightning callback."""

import pytest
import torch
from torchvision_cases import CLASSES, batch, detector

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed (pip install .[hosts])")

from fastkd.integrations.lightning import attach  # noqa: E402


class Module(pl.LightningModule):
    """A user's module, which knows nothing of distillation."""

    def __init__(self):
        super().__init__()
        self.model = detector("retinanet")

    def training_step(self, data, index):
        losses = self.model(*data)
        self.log_dict({name: value.detach() for name, value in losses.items()})
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.001)


def fit(module, kd, folder, steps=4, ckpt_path=None, **options):
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[kd.callback], logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, accelerator="cpu", devices=1, **options,
    )  # fmt: skip
    batches = [batch("retinanet", seed=seed) for seed in range(8)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def attached(method="icd"):
    torch.manual_seed(0)
    module = Module()
    teacher = None if method == "lgd" else detector("retinanet", channels=64, width=24, seed=1).eval()
    return module, attach(module.model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_a_callback_steps_and_logs(method, tmp_path):
    module, kd = attached(method)
    trainer = fit(module, kd, tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    assert kd.state.steps == 4 and kd.state.computed == 8 and kd.distillation.total_steps == 4
    name = f"{method}_distill"
    assert name in trainer.logged_metrics and f"fastkd/{name}" in trainer.logged_metrics
    assert not any("method" in key for key in module.state_dict())


def test_the_checkpoint_resumes_and_loads_without_us(tmp_path):
    module, kd = attached()
    trainer = fit(module, kd, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again, again_kd = attached()
    fit(again, again_kd, tmp_path, steps=3, ckpt_path=tmp_path / "run.ckpt")
    assert again_kd.state.steps == 3
    plain = Module()
    plain.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"], strict=True)
