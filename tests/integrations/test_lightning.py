"""Distillation by one Lightning callback."""

import pytest
import torch
from torchvision_cases import CLASSES, batch, detector
from transformers_cases import batch as transformers_batch
from transformers_cases import model_of

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed (pip install .[hosts])")

from fastkd.distillers import PKD  # noqa: E402
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


class SaveAfterTwoSteps(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def fit(module, kd, folder, steps=4, start=0, ckpt_path=None, callbacks=(), batches=None, **options):
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[kd.callback, *callbacks], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, accelerator="cpu", devices=1,
        **options,
    )  # fmt: skip
    batches = batches or [batch("retinanet", seed=seed) for seed in range(start, 8)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def attached(method="icd"):
    torch.manual_seed(0)
    module = Module()
    teacher = None if method == "lgd" else detector("retinanet", channels=64, width=24, seed=1).eval()
    return module, attach(module.model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_a_callback_steps_and_logs(method, tmp_path):
    """With accumulation in bf16; Lightning replaces float16 on a CPU by bf16."""
    module, kd = attached(method)
    trainer = fit(module, kd, tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    assert kd.state.steps == 4 and kd.state.computed == 8 and kd.distillation.total_steps == 4
    name = f"{method}_distill"
    assert name in trainer.logged_metrics and f"fastkd/{name}" in trainer.logged_metrics
    assert not any("method" in key for key in module.state_dict())


def test_the_checkpoint_resumes_and_loads_without_us(tmp_path):
    """The method's state is in Lightning's checkpoint: a resumed run ends as an uninterrupted one."""
    whole, whole_kd = attached()
    fit(whole, whole_kd, tmp_path, callbacks=[SaveAfterTwoSteps(tmp_path / "run.ckpt")])
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["callbacks"]["DistillationCallback"]["steps"] == 2
    Module().load_state_dict(saved["state_dict"], strict=True)
    again, again_kd = attached()
    fit(again, again_kd, tmp_path, start=2, ckpt_path=tmp_path / "run.ckpt")
    assert again_kd.state.steps == 4
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(whole_kd.distillation.network.parameters(), again_kd.distillation.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_compiled_detector(tmp_path):
    """Its backbone, after attaching, with backend "eager"; test_properties.py compiles a whole detector."""
    module, kd = attached()
    module.model.backbone.compile(backend="eager")
    fit(module, kd, tmp_path, steps=2)
    assert kd.state.steps == 2 and kd.state.losses["icd_distill"] > 0


class DetectionTransformer(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model_of()

    def training_step(self, data, index):
        return self.model(**data).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.001)


def test_a_detector_of_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install .[hosts])")
    module = DetectionTransformer()
    kd = attach(module.model, PKD(16, teacher_channels=48, weight=2.0), teacher=model_of(width=48, seed=1).eval())
    fit(module, kd, tmp_path, steps=2, batches=[transformers_batch(seed=seed) for seed in range(2)])
    assert kd.state.steps == 2 and kd.state.losses["pkd_distill"] > 0


def test_another_model_and_a_checkpoint_without_our_state(tmp_path):
    module, kd = attached("lgd")
    with pytest.raises(ValueError, match="must train the attached RetinaNet, got another Module"):
        fit(Module(), kd, tmp_path, steps=1)
    plain = pl.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu",
        callbacks=[SaveAfterTwoSteps(tmp_path / "plain.ckpt")], default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([batch("retinanet", seed=seed) for seed in range(4)], batch_size=None)
    plain.fit(Module(), loader)
    with pytest.warns(UserWarning, match="at step 2, but its checkpoint has no state of DistillationCallback"):
        fit(module, kd, tmp_path, steps=3, ckpt_path=tmp_path / "plain.ckpt")
    assert kd.state.steps == 1


def test_bad_input():
    with pytest.raises(TypeError, match="must be a torchvision detector, got Linear"):
        attach(torch.nn.Linear(1, 1), "lgd")
    module, _ = attached()
    with pytest.raises(ValueError, match="attached already"):
        attach(module.model, "lgd")
