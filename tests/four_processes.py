"""The four processes of test_four_processes.py, two on each of two simulated machines: four_processes.py DATA OUT."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from draws import LONG
from safetensors.torch import save_file
from tiny_runs import silent, tiny_detector, tiny_recipe
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fastkd import assets
from fastkd.detectors import load_detector
from fastkd.training import train
from fastkd.training.build import build
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.parallel.processes import no_sync, processes
from fastkd.training.run.finish import Evaluation
from fastkd.training.run.loading import train_loader
from fastkd.training.schedule import Phase
from fastkd.training.step import sum_losses

# accumulated parts, compression, tolerance
CASES = [(1, "none", 1e-4), (1, "bf16", 0.02), (2, "fp16", 2e-3)]
if os.environ.get(LONG):
    CASES.append((2, "none", 1e-4))
STEPS = 2  # a static graph is learnt in the first and used in the second
RUNTIME = RuntimeConfig(precision="float32", log_every=1, checkpoint_every=100, ledger_pairs=0)


def recipe_of(data, accumulate):
    """LGD and ICD on one student, no batch statistics."""
    schedule = Schedule(steps=STEPS, batch_size=8, accumulate=accumulate)
    detector = tiny_detector("retinanet", norm="frozen_bn", head_norm="gn")
    recipe = tiny_recipe(data, "retinanet", "lgdicd", detector=detector, schedule=schedule, runtime=RUNTIME)
    data = dataclasses.replace(recipe.data, val_batch_size=1, val_short_side=128, max_side=256)
    return dataclasses.replace(recipe, data=data)


def evaluate(recipe, group):
    """Metrics and detections of a trained detector."""
    detector, _ = load_detector(assets.resolve("asset:scenes-retinanet-teacher.safetensors"))
    metrics, evaluator = Evaluation(build(recipe), group).run(detector, progress=False)
    return metrics, evaluator.results()


def gradients(recipe, group, compression):
    """Gradients of every step, the weights left alone, and the bytes and types sent for them."""
    built = build(recipe)
    module, sent, found = built.module.train(), [], {}
    accumulate = recipe.schedule.accumulate
    wrapped = group.wrap(module, accumulates=accumulate > 1, compression=compression)
    if compression == "none" and isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, default_hooks.allreduce_hook)  # what DDP does by itself, to be seen below
    plain = dist.all_reduce

    def counting(tensor, *args, **options):
        if options.get("async_op"):
            sent.append((str(tensor.dtype), tensor.nbytes))
        return plain(tensor, *args, **options)

    dist.all_reduce = counting
    batches = iter(train_loader(built, group))
    for step in range(STEPS):
        module.zero_grad(set_to_none=True)
        for number in range(1, accumulate + 1):
            with no_sync(wrapped, number < accumulate):
                (sum_losses(wrapped(next(batches), Phase(distill=True))) / accumulate).backward()
        found |= {f"{step}:{n}": p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    dist.all_reduce = plain
    static = getattr(wrapped, "static_graph", None)
    unused = getattr(wrapped, "find_unused_parameters", None)
    return found, {"sent": sent, "static": static, "find_unused": unused}


def refusal(function):
    """The message of the raised error."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with processes("cpu", timeout=1) as group:
        report = {"ranks": [group.rank, int(os.environ["LOCAL_RANK"]), group.world_size]}
        for accumulate, compression, _ in CASES:
            found, told = gradients(recipe_of(data, accumulate), group, compression)
            report[f"{accumulate}-{compression}"] = told
            if group.first:
                save_file(found, out / f"{accumulate}-{compression}.safetensors")
        run = dataclasses.replace(recipe_of(data, 2), runtime=dataclasses.replace(RUNTIME, grad_compression="bf16"))
        report["bf16"] = train(run, out / "bf16", device="cpu", console=silent()).status
        report["run"] = train(recipe_of(data, 2), out / "run", device="cpu", console=silent()).status
        report["metrics"], report["detections"] = evaluate(run, group)
        uneven = dataclasses.replace(run, schedule=Schedule(batch_size=6))
        report["uneven"] = refusal(lambda: train(uneven, out / "uneven", device="cpu", console=silent()))
        (out / f"report-{group.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
