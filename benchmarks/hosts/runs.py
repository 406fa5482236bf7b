"""One training run with a host's entry point: the host alone, with a method, or the teacher."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.hosts.plan import BATCH, CLASSES, LGD_SETTINGS, METHODS, OWN, SIDE, START_CLASSES
from benchmarks.hosts.scenes import Scenes, write_yolo
from fastkd.assets import FOLDER
from fastkd.detectors.backbones.resnet import ScaledResNet
from fastkd.distillers import LGD
from fastkd.distillers.protocol import Distiller
from fastkd.integrations import methods
from fastkd.ops import use_backend

WARM_UP = 5  # first steps of a clock that do not count
CHANNELS = 64  # of the pyramids of torchvision's detectors
WIDTH = 64  # of RT-DETR
YOLO_WIDTH = 128  # of the widest level of the narrow YOLO11
CLIP = 2.0  # norm of the gradient of torchvision's detectors
EPOCHS = 4  # at least, of Ultralytics' schedule, which changes the rate after each
TUNED = {"lgd": functools.partial(LGD, **LGD_SETTINGS)}  # the other methods are attached by name
Found = list[tuple[Tensor, Tensor, Tensor]]  # boxes xyxy, labels from 0 and scores of each validation image


@dataclass
class Job:
    """Specification of a run.

    Args:
        data: folder of the scenes.
        folder: folder of this run, for the host's files.
        method: "teacher", "start" (pretrains the student), "alone", "icd", "lgd", or "own" for the host's built-in
            distillation.
        steps: optimiser steps.
        rate: learning rate; None: the host's default.
        seed: seed of all random numbers.
        teacher: file of the trained teacher; unused by the methods without one.
        device: "cpu" or "cuda".
        start: file of the pretrained student; None: random weights, or a pretrained backbone where there is one.
    """

    data: Path
    folder: Path
    method: str
    steps: int
    rate: float | None
    seed: int
    teacher: Path
    device: str
    start: Path | None = None

    @property
    def classes(self) -> int:
        """Object classes of the data."""
        return START_CLASSES if self.method == "start" else CLASSES

    @property
    def distils(self) -> bool:
        """Whether the run uses fastkd."""
        return self.method in methods.METHODS


class Clock:
    """Seconds of each step, from one tick to the next.

    On a CPU these are of the process's CPU time, which other processes disturb less than wall time.
    """

    def __init__(self, device: str):
        self.device, self.ticks = device, []

    def tick(self, *args: Any, **kwargs: Any) -> None:
        """Call after each step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.ticks.append(time.perf_counter())
        else:
            self.ticks.append(time.process_time())

    def median(self) -> float:
        """Median seconds per step, without the first few."""
        steps = [after - before for before, after in itertools.pairwise(self.ticks)]
        return statistics.median(steps[WARM_UP:] or steps)


def times_by_method(host: str, device: str, train: Callable[[str, Clock], Any]) -> dict[str, float]:
    """Median seconds of a step by method, of fastkd's with the reference backend, too ("icd reference")."""
    found = {}
    for method in METHODS[host]:
        for reference in (False, True) if method in methods.METHODS else (False,):
            clock = Clock(device)
            with use_backend("reference") if reference else contextlib.nullcontext():
                train(method, clock)
            found[f"{method} reference" if reference else method] = clock.median()
    return found


def method_of(job: Job, channels: int) -> str | Distiller:
    """The method of a run, for a student whose widest level has these channels: ICD by name, LGD for short runs."""
    build = TUNED.get(job.method)
    return job.method if build is None else build(CLASSES, channels)


def pyramid(teacher: bool) -> nn.Module:
    """A narrow ResNet with an FPN of /8 to /128, pretrained on scenes by the files that fastkd ships."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    if teacher:
        body, file = ScaledResNet("resnet34", 0.375, "bn"), "scenes-retinanet-teacher.safetensors"
    else:
        body, file = ScaledResNet("resnet18", 0.25, "frozen_bn"), "scenes-resnet18-backbone.safetensors"
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in load_file(FOLDER / file).items()}
    body.load_state_dict({name: tensors[name] for name in body.state_dict()})
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(body, levels, body.out_channels[1:], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))


def retinanet(teacher: bool) -> nn.Module:
    """torchvision's RetinaNet: group norms in the head, three square anchors in each cell."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead

    sizes = tuple((0.6 * side, side, 1.41 * side) for side in (24, 48, 96, 192, 384))
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    head = RetinaNetHead(CHANNELS, 3, CLASSES, norm_layer=functools.partial(nn.GroupNorm, 32))
    return RetinaNet(pyramid(teacher), CLASSES, min_size=SIDE, max_size=SIDE, anchor_generator=anchors, head=head)


def fcos(teacher: bool) -> nn.Module:
    """torchvision's FCOS with two convolutions in each tower of its head."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.fcos import FCOSHead

    head = FCOSHead(CHANNELS, 1, CLASSES, num_convs=2)
    return FCOS(pyramid(teacher), CLASSES, min_size=SIDE, max_size=SIDE, head=head)


def batches(job: Job) -> torch.utils.data.DataLoader:
    """Shuffled batches of lists."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.utils.data.DataLoader(
        Scenes(job.data, "train"), BATCH, shuffle=True, drop_last=True, generator=generator,
        collate_fn=lambda items: [list(part) for part in zip(*items)],
    )  # fmt: skip


def learning_rate(job: Job) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, job.steps // 20)
    return lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / job.steps)) / 2)


def trained(job: Job, build: Callable[[bool], nn.Module]) -> nn.Module:
    """The trained teacher."""
    teacher = build(True).eval()
    teacher.load_state_dict(torch.load(job.teacher, weights_only=True))
    return teacher.to(job.device)


def attach_torchvision(
    job: Job, model: nn.Module, attach: Callable[..., Any], build: Callable[[bool], nn.Module]
) -> Any:
    """The attachment of a run; None for runs without distillation."""
    if not job.distils:
        return None
    teacher = trained(job, build) if methods.needs_teacher(job.method) else None
    method = method_of(job, CHANNELS)
    return attach(model, method, teacher=teacher, num_classes=CLASSES, total_steps=job.steps, seed=job.seed)


@torch.no_grad()
def detect_torchvision(job: Job, model: nn.Module) -> Found:
    """The model's detections on the validation split."""
    scenes, found = Scenes(job.data, "val"), []
    for start in range(0, len(scenes), BATCH):
        images = [scenes[index][0].to(job.device) for index in range(start, min(start + BATCH, len(scenes)))]
        found += [(result["boxes"], result["labels"], result["scores"]) for result in model.eval()(images)]
    return found


def torchvision(job: Job, clock: Clock) -> Callable[[], Found]:
    """The reference loop with FCOS: forward, backward, step."""
    from fastkd.integrations.torchvision import attach

    model = fcos(job.method == "teacher").to(job.device).train()
    kd = attach_torchvision(job, model, attach, fcos)
    optimizer = torch.optim.AdamW(model.parameters(), job.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(job))
    endless = itertools.chain.from_iterable(itertools.repeat(batches(job)))
    for images, targets in itertools.islice(endless, job.steps):
        images = [image.to(job.device) for image in images]
        targets = [{name: value.to(job.device) for name, value in target.items()} for target in targets]
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if kd is not None:
            kd.step()
        clock.tick()
    torch.save(model.state_dict(), job.folder / "model.pt")
    return functools.partial(detect_torchvision, job, model)


def lightning(job: Job, clock: Clock) -> Callable[[], Found]:
    """RetinaNet in a LightningModule."""
    import lightning.pytorch as pl

    from fastkd.integrations.lightning import attach

    class Module(pl.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return sum(self.model(*batch).values())

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), job.rate, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(job))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_batch_end(self, *args):
            clock.tick()

    module = Module(retinanet(job.method == "teacher"))
    kd = attach_torchvision(job, module.model, attach, retinanet)
    trainer = pl.Trainer(
        max_steps=job.steps, accelerator=job.device, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, gradient_clip_val=CLIP, callbacks=[kd.callback] if kd else None,
    )  # fmt: skip
    trainer.fit(module, batches(job))
    torch.save(module.model.state_dict(), job.folder / "model.pt")
    return functools.partial(detect_torchvision, job, module.model.to(job.device))


def rt_detr(job: Job) -> nn.Module:
    """A small RT-DETR, pretrained but for its classes where the job has a start."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    if job.start is not None:
        return RTDetrForObjectDetection.from_pretrained(job.start, num_labels=CLASSES, ignore_mismatched_sizes=True)
    sizes = [16, 32, 64, 96]
    backbone = RTDetrResNetConfig(
        embedding_size=sizes[0], hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=sizes[1:], encoder_hidden_dim=WIDTH, encoder_ffn_dim=2 * WIDTH,
        d_model=WIDTH, decoder_in_channels=[WIDTH] * 3, decoder_ffn_dim=2 * WIDTH, decoder_layers=3, num_queries=100,
        num_denoising=50, num_labels=job.classes,
    )  # fmt: skip
    return RTDetrForObjectDetection(config)


def normalised(target: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """A target of a square image in transformers' form: box centres and sizes divided by its side."""
    low, high = (target["boxes"] / side).split(2, 1)
    return {"class_labels": target["labels"], "boxes": torch.cat([(low + high) / 2, high - low], 1)}


def collate_transformers(items: list) -> dict[str, Any]:
    """A batch of transformers."""
    labels = [normalised(target, SIDE) for _, target in items]
    return {"pixel_values": torch.stack([image for image, _ in items]), "labels": labels}


@torch.no_grad()
def detect_transformers(job: Job, model: Any) -> Found:
    """The model's detections on the validation split."""
    import transformers as hf

    processor, found, scenes = hf.RTDetrImageProcessor(), [], Scenes(job.data, "val")
    for index in range(len(scenes)):
        output = model.eval()(pixel_values=scenes[index][0][None].to(model.device))
        sizes = torch.tensor([[SIDE, SIDE]])
        result = processor.post_process_object_detection(output, threshold=0.001, target_sizes=sizes)[0]
        found.append((result["boxes"], result["labels"], result["scores"]))
    return found


def transformers(job: Job, clock: Clock) -> Callable[[], Found]:
    """The stock Trainer."""
    import transformers as hf

    from fastkd.integrations.transformers import attach

    class Tick(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    model, callbacks = rt_detr(job), [Tick()]
    if job.distils:
        teacher = trained(job, fcos) if methods.needs_teacher(job.method) else None
        kd = attach(model, method_of(job, WIDTH), teacher=teacher, num_classes=CLASSES, seed=job.seed)
        callbacks.append(kd.callback)
    arguments = hf.TrainingArguments(
        str(job.folder), max_steps=job.steps, per_device_train_batch_size=BATCH, learning_rate=job.rate,
        warmup_steps=max(1, job.steps // 20), lr_scheduler_type="cosine", max_grad_norm=0.1, save_strategy="no",
        logging_steps=50, report_to=[],
        disable_tqdm=True, remove_unused_columns=False, use_cpu=job.device == "cpu", seed=job.seed,
    )  # fmt: skip
    trainer = hf.Trainer(
        model, arguments, train_dataset=Scenes(job.data, "train"), data_collator=collate_transformers,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    model.eval().save_pretrained(job.folder / "model.pt")
    return functools.partial(detect_transformers, job, model)


def detect_ultralytics(job: Job, weights: Path) -> Found:
    """The detections of a trained file on the validation split."""
    from ultralytics import YOLO

    trained, found, device = YOLO(weights), [], yolo_device(job)
    for entry in Scenes(job.data, "val").images:
        path = str(job.data / "val" / entry["file_name"])
        boxes = trained.predict(path, imgsz=SIDE, conf=0.001, verbose=False, device=device)[0].boxes
        found.append((boxes.xyxy, boxes.cls.long(), boxes.conf))
    return found


def narrow_yolo(folder: Path) -> Path:
    """Writes the host's description of YOLO11n with half the width."""
    import ultralytics
    from ultralytics.utils import YAML

    content = YAML.load(Path(ultralytics.__file__).parent / "cfg" / "models" / "11" / "yolo11.yaml")
    depth, width, most = content["scales"]["n"]
    content["scales"] = {"n": [depth, width / 2, most]}
    path = folder.resolve() / "yolo11n.yaml"
    YAML.save(path, content)
    return path


def yolo_device(job: Job) -> str | int:
    """The device as Ultralytics names it."""
    return "cpu" if job.device == "cpu" else 0


def ultralytics(job: Job, clock: Clock) -> Callable[[], Found]:
    """YOLO.train on all images, or on a part of them in short runs; "own" is Ultralytics' built-in distillation."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from fastkd.integrations.ultralytics import attach

    images = len(Scenes(job.data, "train"))
    epochs = max(min(EPOCHS, job.steps), math.ceil(job.steps * BATCH / images))
    part = min(1.0, job.steps // epochs * BATCH / images)
    settings: dict[str, Any] = {
        "data": str(write_yolo(job.data)), "epochs": epochs, "fraction": part, "warmup_epochs": 0.5, "imgsz": SIDE,
        "batch": BATCH, "nbs": BATCH, "workers": 0, "device": yolo_device(job), "plots": False, "amp": False,
        "val": False, "project": str(job.folder.resolve()), "name": "run", "exist_ok": True, "seed": job.seed,
        "verbose": False, "mosaic": 0.0,  # they halve objects that are small as it is
    }  # fmt: skip
    model = YOLO("yolo11n.yaml" if job.method == "teacher" else narrow_yolo(job.folder))
    if job.start is not None:
        model.load(job.start)
    model.add_callback("on_train_batch_end", clock.tick)
    if job.distils:
        teacher = YOLO(job.teacher) if methods.needs_teacher(job.method) else None
        kd = attach(model, method_of(job, YOLO_WIDTH), teacher=teacher, num_classes=CLASSES, seed=job.seed)
        settings["trainer"] = kd.trainer
    elif job.method == OWN:
        settings["distill_model"] = str(job.teacher)
    model.train(**settings)
    last = job.folder / "run" / "weights" / "last.pt"
    (job.folder / "model.pt").write_bytes(last.read_bytes())
    return functools.partial(detect_ultralytics, job, last)


TRAIN: dict[str, Callable[[Job, Clock], Callable[[], Found]]] = {
    "torchvision": torchvision,
    "lightning": lightning,
    "transformers": transformers,
    "ultralytics": ultralytics,
}
"""Trains in a host; returns a function that detects on the validation images."""
