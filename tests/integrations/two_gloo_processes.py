"""Gradients of two gloo processes on half the batch each: python two_gloo_processes.py RANK FILE_STORE OUT."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d
from torchvision_cases import CLASSES, batch, detector

from fastkd.integrations.torchvision import attach

COUNTS = (3, 1, 0, 2)


def gradients(method, part, wrap=lambda model: model):
    """Gradients of student and method of part of a batch, after averaging over processes."""
    model = detector("retinanet", norm=FrozenBatchNorm2d).train()
    teacher = None if method == "lgd" else detector("retinanet", channels=64, width=24, seed=1).eval()
    kd = attach(model, method, teacher=teacher, num_classes=CLASSES, detach_steps=0)
    images, targets = batch("retinanet", COUNTS)
    network = wrap(model)  # its reducer lives as long as the wrapper
    sum(network(images[part], targets[part]).values()).backward()
    kd.distillation.optimizer.average_gradients()
    named = [*model.named_parameters(), *kd.distillation.network.named_parameters()]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def main():
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = slice(rank * 2, rank * 2 + 2)
    found = {method: gradients(method, half, DistributedDataParallel) for method in ("icd", "lgd", "fgfi")}
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
