"""Gradients of two gloo processes on half the batch each: python two_gloo_processes.py RANK FILE_STORE OUT."""

import datetime
import functools
import importlib.util
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d
from torchvision_cases import CLASSES, batch, detector

from fastkd.integrations.torchvision import attach

COUNTS = (3, 1, 0, 2)
METHODS = ("icd", "lgd", "fgfi")


def students(method):
    """A detector without batch statistics, which belong to one process, and its attachment."""
    model = detector("retinanet", norm=FrozenBatchNorm2d).train()
    teacher = None if method == "lgd" else detector("retinanet", channels=64, width=24, seed=1).eval()
    return model, attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)


def gradients_of(model, kd):
    """Gradients of student and method by name, after averaging over processes."""
    kd.distillation.optimizer.average_gradients()
    named = [*model.named_parameters(), *kd.distillation.network.named_parameters()]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def torchvision_gradients(method, part, wrap=lambda model: model):
    """Of part of a batch."""
    model, kd = students(method)
    images, targets = batch("retinanet", COUNTS)
    network = wrap(model)  # its reducer lives as long as the wrapper
    sum(network(images[part], targets[part]).values()).backward()
    return gradients_of(model, kd)


def transformers_gradients(method, part, wrap=lambda model: model):
    """RT-DETR without denoising, which is random; it divides by the boxes of its process: both have the same number."""
    from transformers_cases import CLASSES, batch, model_of

    from fastkd.integrations.transformers import attach

    model = model_of().train()
    model.config.num_denoising = 0
    for norm in [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]:
        norm.eval()
    teacher = None if method == "lgd" else model_of(width=48, seed=1).eval()
    kd = attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)
    inputs, network = batch((2, 1, 0, 3)), wrap(model)
    network(pixel_values=inputs["pixel_values"][part], labels=inputs["labels"][part]).loss.backward()
    return gradients_of(model, kd)


def lightning_step(method, part, strategy="auto", devices=1):
    """Weights of the student after one step of Lightning's Trainer, and a tenth of the method's gradient."""
    import lightning.pytorch as pl

    from fastkd.integrations.lightning import DistillationCallback

    class Module(pl.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, data, index):
            return sum(self.model(*data).values())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    model, kd = students(method)
    images, targets = batch("retinanet", COUNTS)
    trainer = pl.Trainer(
        max_steps=1, callbacks=[DistillationCallback(kd)], logger=False, enable_progress_bar=False, devices=devices,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", strategy=strategy,
        use_distributed_sampler=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader([(images[part], targets[part])], batch_size=None)
    trainer.fit(Module(model), data)
    states = kd.distillation.optimizer.adamw.state_dict()["state"]
    averages = {f"exp_avg.{index}": state["exp_avg"] for index, state in states.items()}
    return {name: value.detach() for name, value in model.named_parameters()} | averages


def _raise(*args):
    raise RuntimeError("broken")


def failing_run(method, rank):
    """A run in which the method fails in one process, before or after it waits for the other.

    Returns: for each batch the names of the method's losses, the number of failures, and gradients of the student and
        weights of the method by name.
    """
    model, kd = students(method)
    network = DistributedDataParallel(model)
    found = []
    for failing in (None, "inputs", "after", None, "before", None):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if failing == "inputs" and rank == 0:
                patch.setattr(kd, "_host_step", _raise)
            elif failing == "after" and rank == 1:
                patch.setattr(kd.distillation.probe, "due", _raise)
            elif failing == "before" and rank == 0:
                patch.setattr(kd.distillation.network, "forward", _raise)
            model.zero_grad()
            losses = network(*batch("retinanet", (2, 1), seed=rank))
            (sum(losses.values()) * (1 + rank)).backward()  # each process has its own factor
            kd.step()
        state = {name: p.grad.clone() for name, p in model.named_parameters()}
        state |= {name: p.detach().clone() for name, p in kd.distillation.network.named_parameters()}
        found.append(([name for name in losses if name.startswith(method)], kd.state.failures, state))
    return found


def failing_first_batch(rank):
    """The errors of a first batch and of a first update that fail in one process."""
    model, kd = students("icd")
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(kd, "_host_step", _raise)
        with pytest.raises(RuntimeError) as error:
            model(*batch("retinanet"))
        errors.append(str(error.value))
    sum(model(*batch("retinanet")).values()).backward()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(kd.distillation.network.record, "next_step", _raise)
        with pytest.raises(RuntimeError) as error:
            kd.step()
        errors.append(str(error.value))
    return errors


HOSTS = {"torchvision": torchvision_gradients, "transformers": transformers_gradients, "lightning": lightning_step}


def gradients_of_rank(rank, store):
    """Gradients of this process's half of the batch by (host, method), and failing runs, in a group of two."""
    timeout = datetime.timedelta(seconds=200)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    half = slice(rank * 2, rank * 2 + 2)
    found = {
        ("torchvision", method): torchvision_gradients(method, half, DistributedDataParallel) for method in METHODS
    }
    found |= {("failing", method): failing_run(method, rank) for method in ("icd", "scorel2", "lgd")}
    found["failing", "first"] = failing_first_batch(rank)
    if importlib.util.find_spec("transformers"):
        wrap = functools.partial(DistributedDataParallel, find_unused_parameters=True)
        found |= {("transformers", method): transformers_gradients(method, half, wrap) for method in METHODS[:2]}
    if importlib.util.find_spec("lightning"):
        found |= {("lightning", method): lightning_step(method, half, "ddp", 2) for method in METHODS[:2]}
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


def environment_of_rank(rank):
    """Variables with which Lightning starts no processes."""
    return {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}


def main():
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    os.environ |= environment_of_rank(rank)
    torch.save(gradients_of_rank(rank, store), f"{out}/{rank}.pt")


if __name__ == "__main__":
    main()
