"""Teachers from the supported packages, recognised by attributes, so that no package needs to be imported."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from fastkd.integrations.detections import DetectTorchvision, DetectTransformers, DetectUltralytics
from fastkd.integrations.scores import cell_scores, of_ultralytics
from fastkd.integrations.teachers import Normalization, Teacher, features_before, features_until


def pick_teacher(teacher: Any, num_classes: int) -> Teacher | None:
    """A detector of any supported package as `Teacher`; warns if its number of classes differs.

    Args:
        teacher: a detector of torchvision, transformers or Ultralytics, another module, a `Teacher`, or None.
        num_classes: object classes of the data.
    """
    if teacher is None:
        return None
    if isinstance(teacher, Teacher):
        picked = teacher
    elif hasattr(teacher, "transform") and hasattr(teacher, "backbone"):
        picked = torchvision_teacher(teacher, num_classes)
    elif yolo_network(teacher) is not None:
        picked = ultralytics_teacher(teacher)
    elif hasattr(getattr(teacher, "model", None), "encoder") and hasattr(teacher, "config"):
        picked = transformers_teacher(teacher)
    else:
        picked = Teacher(teacher, scores=cell_scores(teacher))
    if picked.num_classes not in (None, num_classes):
        warnings.warn(
            f"fastkd: the teacher knows {picked.num_classes} classes, the student {num_classes}; a teacher teaches "
            "best on the same classes. kd.report() says whether it finds the objects of a batch",
            stacklevel=3,
        )
    return picked


def output_classes(model: Any) -> int:
    """Number of outputs of the classifier, including a background class."""
    if hasattr(model, "roi_heads"):
        return int(model.roi_heads.box_predictor.cls_score.out_features)
    head = model.head.classification_head
    return int(head.num_columns if hasattr(head, "num_columns") else head.num_classes)


def has_background(model: Any) -> bool:
    """Whether class 0 of the classifier is the background: two-stage detectors and SSD."""
    return hasattr(model, "roi_heads") or hasattr(model.head.classification_head, "num_columns")


def image_normalization(model: Any) -> Normalization:
    return Normalization(tuple(model.transform.image_mean), tuple(model.transform.image_std))


def torchvision_teacher(teacher: Any, num_classes: int | None = None) -> Teacher:
    """A torchvision detector as teacher; only its backbone is run.

    Args:
        teacher: the detector.
        num_classes: object classes of the data, which determine whether the teacher's labels begin at 0 or 1; None
            takes the teacher's.
    """
    first_label = 1 if has_background(teacher) or output_classes(teacher) == (num_classes or 0) + 1 else 0
    return Teacher(
        teacher,
        teacher.backbone,
        normalization=image_normalization(teacher),
        detect=DetectTorchvision(teacher, first_label),
        num_classes=output_classes(teacher) - first_label,
        scores=cell_scores(teacher),
    )


def normalization_of(processor: Any) -> Normalization:
    """The normalisation of an image processor; the identity without a processor."""
    if processor is None or not getattr(processor, "do_normalize", False):
        return Normalization()
    return Normalization(tuple(processor.image_mean), tuple(processor.image_std))


def transformers_teacher(teacher: Any, *, processor: Any = None) -> Teacher:
    """A transformers detector as teacher; its forward pass is stopped after the encoder."""
    normalization = normalization_of(processor)
    return Teacher(
        teacher,
        features_until(teacher, teacher.model.encoder),
        normalization=normalization,
        detect=DetectTransformers(teacher, normalization),
        num_classes=teacher.config.num_labels,
        scores=cell_scores(teacher),
    )


def yolo_network(teacher: Any) -> nn.Module | None:
    """The network of a YOLO, or the argument if it is a network; None for any other object."""
    for network in (teacher, getattr(teacher, "model", None)):
        if isinstance(getattr(network, "model", None), nn.Sequential) and hasattr(network, "yaml"):
            return network
    return None


def ultralytics_teacher(teacher: Any) -> Teacher:
    """A YOLO, or its network, as teacher; its forward pass is stopped before the head.

    Raises: TypeError for any other object.
    """
    network = yolo_network(teacher)
    if network is None:
        raise TypeError(f"ultralytics_teacher: teacher must be a YOLO or its network, got {type(teacher).__name__}")
    network.float().eval()  # a YOLO's network is in train mode
    layers: Any = network.model
    head = layers[-1]
    return Teacher(
        network,
        features_before(network, head),
        normalization=Normalization(),
        detect=DetectUltralytics(network, head),
        num_classes=head.nc,
        scores=functools.partial(of_ultralytics, head),
    )
