"""The hosts behind one interface, for the properties that hold in every host."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

OWN = ("icd_", "lgd_", "pkd_", "scorel2_")


@dataclass(frozen=True)
class Host:
    """A host.

    Args:
        model: seed -> a small detector in train mode.
        teacher: () -> a wider detector in eval mode.
        attach: as the host's `attach`; returns an `Attachment`.
        losses: (model, seed of the batch) -> everything that the host adds up, by name.
        classes: of its batches.
        width: widest level of the teacher.
        lose: the model loses the part whose output the attachment reads, as in another version of the host.
        compile: compiles a model as the host's users do, without a C++ compiler.
    """

    model: Callable
    teacher: Callable
    attach: Callable
    losses: Callable
    classes: int
    width: int
    lose: Callable
    compile: Callable = lambda model: torch.compile(model, backend="eager")

    def attached(self, method="icd", seed=0, **options):
        """A model and its attachment."""
        model = self.model(seed)
        needs = "lgd" not in (method if isinstance(method, str) else type(method).__name__.lower())
        kd = self.attach(model, method, teacher=self.teacher() if needs else None, **{"detach_steps": 0} | options)
        return model, kd

    def run(self, model, seed=0):
        """Total loss, and the losses of the method, with the host's random numbers from a fixed seed."""
        torch.manual_seed(seed)
        losses = self.losses(model, seed)
        return sum(losses.values()), {name: value for name, value in losses.items() if name.startswith(OWN)}


def _replace(name):
    """A function of a model that replaces a part of it by a copy, without the hooks."""

    def lose(model):
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, copy.deepcopy(getattr(owner, last)))

    return lose


def _torchvision():
    from torchvision_cases import CLASSES, batch, detector

    from fastkd.integrations.torchvision import attach

    return Host(
        lambda seed: detector("retinanet", seed=seed).train(),
        lambda: detector("retinanet", channels=64, width=24, seed=9).eval(),
        attach, lambda model, seed: model(*batch("retinanet", seed=seed)), CLASSES, 64, _replace("backbone"),
    )  # fmt: skip


def _transformers(kind):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install .[hosts])")
    from transformers_cases import CLASSES, batch, model_of

    from fastkd.integrations.transformers import attach

    def losses(model, seed):
        output = model(**batch(seed=seed))
        own = {name: value for name, value in output.loss_dict.items() if name.startswith(OWN)}
        return {**own, "loss": output.loss - sum(own.values())}

    def compile_parts(model):
        """Compiles the parts that the attachment hooks; the whole model takes a minute to trace."""
        model.model.backbone.compile(backend="eager")
        if kind == "DeformableDetr":
            model.model.encoder.compile(backend="eager")
        return model

    def drop(module, args, output):
        output.encoder_last_hidden_state = None

    def lose(model):
        if kind == "DeformableDetr":
            _replace("model.encoder")(model)
        else:
            model.register_forward_hook(drop, prepend=True)

    return Host(
        lambda seed: model_of(kind, seed=seed).train(), lambda: model_of(kind, width=64, seed=9).eval(),
        attach, losses, CLASSES, 64, lose, compile_parts,
    )  # fmt: skip


def _ultralytics():
    pytest.importorskip("ultralytics", reason="ultralytics cannot be imported", exc_type=ImportError)
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load
    from ultralytics.utils import DEFAULT_CFG

    from fastkd.integrations.ultralytics import attach

    classes = 3

    def network(seed, width):
        torch.manual_seed(seed)
        config = yaml_model_load("yolo11n.yaml") | {"scales": {"n": [0.34, width, 1024]}}
        made = DetectionModel(config, nc=classes, verbose=False)
        made.args = DEFAULT_CFG
        return made

    def losses(model, seed):
        generator = torch.Generator().manual_seed(seed)
        boxes = torch.cat([0.3 + 0.4 * torch.rand(3, 2, generator=generator), torch.full((3, 2), 0.4)], 1)
        images = torch.rand(2, 3, 64, 64, generator=generator)
        index, labels = torch.tensor([0.0, 0, 1]), torch.tensor([[0.0], [1], [2]])
        total, items = model({"img": images, "batch_idx": index, "cls": labels, "bboxes": boxes})
        own = {name: total[-1] * 0 + value for name, value in items.items() if name.startswith(OWN)}
        return {**own, "loss": total.sum() - sum(own.values())}

    def compile_layers(model):
        """Two of the layers that the trainer compiles one by one: the first and the last before the head."""
        for layer in (model.model[0], model.model[-2]):
            layer.compile(backend="eager")
        return model

    return Host(
        lambda seed: network(seed, 0.125).train(), lambda: network(9, 0.25).eval(),
        lambda model, method, **options: attach(None, method, **options).start(model, classes),
        losses, classes, 256, lambda model: _replace(f"model.{len(model.model) - 1}")(model), compile_layers,
    )  # fmt: skip


def _stand_in(kind, attach, losses, part):
    from torchvision_cases import CLASSES

    def model(seed, channels=16):
        torch.manual_seed(seed)
        return kind(channels)

    return Host(
        lambda seed: model(seed).train(), lambda: model(9, 24).eval(), attach, losses, CLASSES, 24, _replace(part)
    )


def _detectron2():
    from detectron2_cases import MetaArchitecture, inputs

    from fastkd.integrations.detectron2 import attach

    return _stand_in(MetaArchitecture, attach, lambda model, seed: model(inputs(seed)), "backbone")


def _mmdetection():
    from mmdetection_cases import Detector, data

    from fastkd.integrations.mmdetection import attach

    def losses(model, seed):
        found = model(**data(seed), mode="loss")
        return {name: sum(value) if isinstance(value, list) else value for name, value in found.items()}

    return _stand_in(Detector, attach, losses, "neck")


HOSTS = {
    "torchvision": _torchvision,
    "transformers": lambda: _transformers("RTDetr"),
    "deformable-detr": lambda: _transformers("DeformableDetr"),
    "ultralytics": _ultralytics,
    "detectron2": _detectron2,
    "mmdetection": _mmdetection,
}


def students_gradient(model: nn.Module) -> float:
    """Sum of the gradients' magnitudes."""
    return sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
