"""The three distillers under DDP: two processes have the gradients of one."""

import torch
import torch.multiprocessing as mp
from ragged import assert_close_gradients, gradients, part_of, priors, ragged_batch, ragged_pyramid
from torch.nn.parallel import DistributedDataParallel

from fastkd.distillers import FGFI, ICD, LGD
from fastkd.ops._support.normalizer import global_mean


def every_distiller(batch, student, teacher, modules):
    """The sum of all losses of the three methods on a batch."""
    lgd, icd, fgfi = modules
    made = lgd(student, batch)
    total = sum(made.losses.values()) + sum(level.square().mean() + level.abs().mean() for level in made.instructive)
    return total + sum(sum(method(student, batch, teacher).losses.values()) for method in (icd, fgfi))


def three_modules():
    torch.manual_seed(0)
    anchors = [torch.tensor([[-s, -s, s, s]]) for s in (6.0, 12.0, 24.0, 48.0)]
    modules = LGD(3, 8, heads=2), ICD(3, priors(3), 8, heads=2, rho=2), FGFI(anchors, 8, weight=1.0)
    torch.nn.init.normal_(modules[2].adapter.weight, std=0.3)
    return torch.nn.ModuleList(modules).double()


class AllMethods(torch.nn.Module):
    """The three distillers as one module, for DDP."""

    def __init__(self):
        super().__init__()
        self.modules_of = three_modules()

    def forward(self, batch, student, teacher):
        return every_distiller(batch, student, teacher, self.modules_of)


def split_inputs(images):
    batch = ragged_batch((3, 1, 0, 0))
    window = slice(images.start, images.stop)
    student, teacher = ragged_pyramid(4, 8), ragged_pyramid(4, 8, seed=1)
    return part_of(batch, images), [level[window] for level in student], [level.detach()[window] for level in teacher]


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.testing.assert_close(global_mean(torch.tensor([rank, 4])), torch.tensor([0.5, 4.0]))
    module = DistributedDataParallel(AllMethods())
    for _ in range(2):  # the second pass would notice parameters without a gradient in the first
        module.zero_grad()
        module(*split_inputs(range(2 * rank, 2 * rank + 2))).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in module.module.named_parameters()}, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """DDP without find_unused_parameters, the second process without any box: the gradients of one process."""
    mp.start_processes(ddp_worker, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    module = AllMethods()
    whole = gradients(module(*split_inputs(range(0, 4))), module)
    assert_close_gradients(found, whole, tolerance=1e-6)
