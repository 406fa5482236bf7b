"""Ultralytics' YOLO (v8, 11, 26 and similar) through a trainer class; the network is not modified.

    kd = attach(model, method="icd", teacher=YOLO("teacher.pt"))       # model = YOLO("yolo11n.yaml")
    model.train(data="data.yaml", trainer=kd.trainer)

Ultralytics is licensed under AGPL-3.0; this file imports it when you import this file.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import image_seeds, make_batch
from fastkd.integrations.hooks import check_plain, host_version, no_levels, warn_of_fresh_method
from fastkd.integrations.host import Attachment, State
from fastkd.integrations.known_teachers import pick_teacher
from fastkd.integrations.priors import check_priors
from fastkd.integrations.teachers import Normalization, Teacher, corners
from fastkd.integrations.traces import unrecorded_statistics
from fastkd.types import ClassPriors

FILE_NAME = "fastkd.pt"


def attach(
    model: YOLO | None = None,
    method: str | Distiller = "icd",
    *,
    teacher: YOLO | nn.Module | Teacher | None = None,
    num_classes: int | None = None,
    priors: ClassPriors | None = None,
    **settings: Any,
) -> YoloDistillation:
    """A distillation with an attribute `trainer`, to be passed to `YOLO.train(trainer=...)`.

    Args:
        model: the student; only its task is checked.
        method: "icd", "lgd" or a `Distiller`.
        teacher: a trained YOLO, a detector of torchvision or transformers, or any module in a `Teacher`.
        num_classes: object classes; None takes those of the data.
        priors: class priors for ICD; None measures them from the first batches.
        **settings: further arguments of `Distillation`: weight, channels, lr, weight_decay, seed.
    Raises: ValueError if the model is for another task, TypeError for other priors.
    """
    task = getattr(model, "task", "detect")
    if task != "detect":
        raise ValueError(f"attach: model must be a YOLO for detection, got one for {task!r}; use a detection model")
    check_priors(priors)
    return YoloDistillation(method, teacher, num_classes, {"priors": priors, **settings})


class YoloDistillation:
    """The settings of a distillation, and its attachment after a trainer has built the network.

    Args:
        method, teacher, num_classes: as in `attach`.
        settings: further arguments of `Distillation`.
    """

    def __init__(self, method: str | Distiller, teacher: Any, num_classes: int | None, settings: dict[str, Any]):
        self.method, self.teacher, self.num_classes, self.settings = method, teacher, num_classes, settings
        self.attachment: YoloAttachment | None = None
        self._path: str | os.PathLike | None = None

    @property
    def trainer(self) -> type[DistillationTrainer]:
        """A trainer class for `YOLO.train(trainer=...)`."""
        return type("DistillationTrainer", (DistillationTrainer,), {"distillation": self})

    def start(self, model: nn.Module, num_classes: int) -> YoloAttachment:
        """Attaches to the network that a trainer has built for data with `num_classes` classes."""
        if self.num_classes not in (None, num_classes):
            raise ValueError(
                f"attach: num_classes must be that of the data, {num_classes}, got {self.num_classes}; leave it out"
            )
        distillation = Distillation(self.method, num_classes=num_classes, **self.settings)
        self.attachment = YoloAttachment(model, distillation, pick_teacher(self.teacher, num_classes))
        if self._path is not None:
            self.attachment.load(self._path)
        return self.attachment

    @property
    def state(self) -> State | None:
        """Progress of the attachment; None before training."""
        return self.attachment.state if self.attachment else None

    def report(self) -> str:
        """A report on losses and gradients, see `Attachment.report`."""
        return self.attachment.report() if self.attachment else "fastkd: training has not begun."

    def step(self) -> None:
        """Updates the method's modules; the trainer class calls it, you do in a loop of your own."""
        self._running("step").step()

    def detach(self) -> None:
        """Removes all hooks; the trainer class does so after training."""
        if self.attachment is not None:
            self.attachment.detach()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a separate checkpoint file."""
        self._running("save").save(path)

    def load(self, path: str | os.PathLike) -> None:
        """Restores a file written by `save`, or the trainer's fastkd.pt; before training, when it begins."""
        self._path = path
        if self.attachment is not None:
            self.attachment.load(path)

    def _running(self, word: str) -> YoloAttachment:
        if self.attachment is None:
            raise RuntimeError(
                f"{word}: the network must have been built, but training has not begun; call "
                "model.train(trainer=kd.trainer) first"
            )
        return self.attachment


class YoloAttachment(Attachment):
    """Hooks before and after the network and before its head; see `attach`.

    The network's losses are sums over the batch, so the method's losses are multiplied by the batch size.
    """

    def __init__(self, model: Any, distillation: Distillation, teacher: Teacher | None):
        _check_attach_points(model)
        super().__init__(model, distillation, teacher, Normalization())
        self._batch: dict[str, Any] | None = None
        self._levels: list[Tensor] | None = None
        self._names: list[str] = []
        self.pre_hook(model, self._keep_batch)
        self.pre_hook(model.model[-1], self._keep_levels)
        self.hook(model, self._add_losses)

    def remove_copies(self, network: nn.Module) -> None:
        """Removes the copies of the hooks from a deep copy of the network, which are no-ops but would be pickled."""
        for part in network.modules():
            for hooks in (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._forward_hooks_with_kwargs,
                part._forward_pre_hooks_with_kwargs,
            ):
                for handle in self._handles:
                    hooks.pop(handle.id, None)

    def _keep_batch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else None
        training = self.model.training and torch.is_grad_enabled()
        self._batch, self._levels = (given if training and isinstance(given, dict) else None), None

    def _keep_levels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._batch is not None:
            self._levels = list(args[0])

    def _add_losses(self, module: nn.Module, args: Any, output: Any) -> Any:
        batch, levels, self._batch, self._levels = self._batch, self._levels, None, None
        if batch is None:
            return None
        loss, items = output
        images, losses = len(batch["img"]), {}
        if self.active:
            losses = self.distil(batch["img"].device, lambda: self._host_step(batch, levels))
        if not losses:  # results.csv keeps its columns
            return loss, {**items, **{name: torch.zeros((), device=loss.device) for name in self._names}}
        self._names = list(losses)
        total = sum(losses.values(), loss.new_zeros(())) * images
        return torch.cat([loss.flatten(), total.view(1).to(loss)]), {**items, **self.losses}

    def _host_step(self, batch: dict[str, Any], levels: list[Tensor] | None) -> HostStep:
        if levels is None:
            raise no_levels(self.model, "the input of its head, model.model[-1]", "ultralytics")
        images = batch["img"]
        height, width = images.shape[-2:]
        index = batch["batch_idx"].view(-1).cpu()
        members = [torch.nonzero(index == image).view(-1).to(images.device) for image in range(len(images))]
        boxes, labels = corners(batch["bboxes"].to(images.device), height, width), batch["cls"].view(-1)
        distillation = self.distillation
        made = make_batch(
            images,
            [(height, width)] * len(images),
            [boxes[own] for own in members],
            [labels.to(images.device)[own] for own in members],
            num_classes=distillation.facts.num_classes,
            seeds=image_seeds(distillation.seed, distillation.computed, len(images)),
            check=self.check_values(images.device),
        )

        def rerun(others: list[Tensor]) -> dict[str, Tensor]:
            """The head and criterion on other levels, mean over the images."""
            with unrecorded_statistics(self.model):
                loss, _ = self.model.criterion(self.model.model[-1].forward(list(others)), batch)
            return {"loss": loss.sum() / len(images)}

        return HostStep(made, levels, self.pyramid_of_teacher(images, made.image_sizes), rerun)


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' trainer with a distillation attached to its network.

    For several GPUs Ultralytics imports the trainer by name: subclass it in a module and set `distillation`.
    """

    distillation: YoloDistillation = YoloDistillation("lgd", None, None, {})

    def setup_model(self) -> Any:
        """Attaches to the plain network, before it is wrapped and copied; compiles its layers if asked to.

        Ultralytics would compile the network as a whole and compute the loss outside of its forward pass, where the
        hooks do not see it. The layers before the head are compiled one by one instead.
        """
        checkpoint = super().setup_model()
        self.distillation.start(self.model, self.data["nc"])
        if self.args.compile:
            mode = "default" if self.args.compile is True else self.args.compile
            for layer in self.model.model[:-1]:
                layer.compile(mode=mode)
            self.args.compile = False
        return checkpoint

    def resume_training(self, ckpt: Any) -> None:
        """Sets the run's length; loads fastkd.pt beside the checkpoint from which the run is resumed.

        The average of the network is made by now, and its copies of our hooks are removed.
        """
        super().resume_training(ckpt)
        attachment = self._attachment()
        attachment.remove_copies(self.ema.ema)
        steps = math.ceil(len(self.train_loader) / max(self.accumulate, 1))
        attachment.distillation.total_steps = steps * self.epochs
        if ckpt is None or not self.resume:
            return
        path = Path(self.args.resume).parent / FILE_NAME
        if path.exists():
            attachment.load(path)
        warn_of_fresh_method(attachment.distillation.steps, self.start_epoch * steps, f"there is no {path}")

    def optimizer_step(self) -> None:
        """Steps the optimiser, then the method's modules."""
        super().optimizer_step()
        self._attachment().step()

    def save_model(self) -> Any:
        """Writes fastkd.pt beside last.pt."""
        saved = super().save_model()
        self._attachment().try_to_save(Path(self.wdir) / FILE_NAME)
        return saved

    def final_eval(self) -> None:
        """Detaches, then evaluates the plain network."""
        self._attachment().detach()
        super().final_eval()

    def _attachment(self) -> YoloAttachment:
        attachment = self.distillation.attachment
        assert attachment is not None  # made by setup_model
        return attachment


def _check_attach_points(model: nn.Module) -> None:
    """Raises TypeError unless the network has the parts that the attachment needs."""
    check_plain(model)
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not hasattr(layers[-1], "forward_head"):
        raise TypeError(
            f"attach: model must be an Ultralytics detection network, got {type(model).__name__} "
            f"({host_version('ultralytics')}); use fastkd.integrations.HostStep for others"
        )
