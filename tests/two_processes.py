"""The two processes of test_distributed.py, started by torchrun: python two_processes.py DATA OUT."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from draws import LONG
from safetensors.torch import save_file
from tiny_runs import silent, tiny_detector, tiny_recipe

from fastkd.data import build_train_loader
from fastkd.training import step, train
from fastkd.training import trainer as trainer_module
from fastkd.training.build import build
from fastkd.training.config import DistillConfig, RuntimeConfig, Schedule
from fastkd.training.methods import LGDConfig
from fastkd.training.parallel.processes import processes
from fastkd.training.schedule import Phase

CASES = [  # every detector and every method
    ("retinanet", "icd"),
    ("fcos", "baseline"),
    ("faster-rcnn", "fgfi"),
    ("mask-rcnn", "lgd"),
    ("atss", "baseline"),
    ("poto", "lgd"),
    ("condinst", "icd"),
    ("solov2", "baseline"),
    ("retinanet", "lgdicd"),
]
if os.environ.get(LONG):  # other pairs of them
    CASES += [
        ("retinanet", "baseline"),
        ("retinanet", "lgd"),
        ("retinanet", "fgfi"),
        ("faster-rcnn", "baseline"),
        ("faster-rcnn", "lgd"),
        ("mask-rcnn", "icd"),
    ]
BATCH = 4


def gradient_recipe(data, kind, method):
    """Without batch statistics, which belong to one process."""
    return tiny_recipe(data, kind, method, detector=tiny_detector(kind, norm="frozen_bn", head_norm="gn"))


def without_boxes(batch, first_image):
    """The batch with no boxes in its images from `first_image` on."""
    keep = batch.image_index < first_image
    counts = [count if image < first_image else 0 for image, count in enumerate(batch.counts)]
    masks = None if batch.masks is None else batch.masks[keep]
    boxes = {"boxes": batch.boxes[keep], "labels": batch.labels[keep], "image_index": batch.image_index[keep]}
    return dataclasses.replace(batch, counts=counts, masks=masks, **boxes)


def gradients(recipe, group):
    """Gradients of two batches: as they are, and with no box in the second half of the images."""
    built = build(recipe)
    module = built.module.train()
    wrapped = group.wrap(module)
    loader = build_train_loader(
        built.train_set, batch_size=BATCH, total_steps=1, world_size=group.world_size, rank=group.rank,
        short_sides=recipe.data.short_sides, max_side=recipe.data.max_side,
    )  # fmt: skip
    found = {}
    for batch in loader:
        boxes_until = BATCH // 2 - group.rank * BATCH // 2 if group.world_size > 1 else BATCH // 2
        for name, part in (("full", batch), ("half empty", without_boxes(batch, boxes_until))):
            module.zero_grad(set_to_none=True)
            step.sum_losses(wrapped(part, Phase(distill=recipe.method is not None))).backward()
            found |= {f"{name}:{n}": p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    return found


def run_recipe(data, out):
    """A balanced run through all phases: frozen backbone, detached student, distillation, none; with accumulation."""
    from fastkd.detectors import build_detector

    recipe = tiny_recipe(data, "retinanet", "lgd")
    weights = out / "backbone.safetensors"
    if not weights.exists():
        save_file(build_detector(recipe.detector).backbone.state_dict(), weights)
    return dataclasses.replace(
        recipe,
        backbone_weights=str(weights),
        method=LGDConfig(freeze_fraction=0.34, detach_fraction=0.5, final_fraction=0.17),
        distill=DistillConfig(balance=0.3, balance_every=2),
        schedule=Schedule(steps=6, batch_size=8, accumulate=2),
        runtime=RuntimeConfig(precision="float32", log_every=2, checkpoint_every=100, ledger_pairs=1, eval_every=4),
    )


def main():
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with processes("cpu") as group:
        for kind, method in CASES:
            found = gradients(gradient_recipe(data, kind, method), group)
            save_file(found, out / f"{kind}-{method}-{group.rank}.safetensors")
        recipe = group.on_rank0(lambda: run_recipe(data, out))
        report = {"whole": train(recipe, out / "whole", device="cpu", console=silent()).status}

        original = trainer_module.Trainer._take_step
        report["balance"] = []

        def stopping(self, parts):
            if self.step + 1 == 3 and group.rank == 1:  # told to one process only
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, parts)

        def recording(self, parts):
            found = original(self, parts)
            report["balance"].append(self.module.balance.state())
            return found

        trainer_module.Trainer._take_step = stopping
        report["stopped"] = train(recipe, out / "halves", device="cpu", console=silent()).exit_code
        trainer_module.Trainer._take_step = recording
        again = train(recipe, out / "halves", device="cpu", console=silent(), resume=True)
        trainer_module.Trainer._take_step = original
        report["resumed"], report["metrics"] = again.status, again.metrics["bbox"]
        report["again"] = train(recipe, out / "halves", device="cpu", console=silent(), resume=True).status
        report["refused"] = refusal(recipe, out / "halves")
        uneven = dataclasses.replace(recipe, schedule=Schedule(batch_size=6, accumulate=2))
        report["uneven"] = refusal(uneven, out / "uneven")

        forward = step.StepModule.forward

        def poisoned(self, batch, phase):
            losses = forward(self, batch, phase)
            if group.rank == 1:
                report["ids"] = batch.image_ids
                losses["box_regression"] = losses["box_regression"] * float("inf")
            return losses

        step.StepModule.forward = poisoned
        report["non-finite"] = refusal(recipe, out / "non-finite")
        (out / f"report-{group.rank}.json").write_text(json.dumps(report))


def refusal(recipe, run_dir):
    """The message of the error that ends a run."""
    try:
        train(recipe, run_dir, device="cpu", console=silent())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
