"""Teachers from the supported packages, recognised by attributes, so that no package needs to be imported."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import Tensor, nn

from fastkd.integrations.detections import DetectTorchvision, DetectTransformers, DetectUltralytics
from fastkd.integrations.scores import cell_scores, of_ultralytics
from fastkd.integrations.teachers import Normalization, Teacher, features_before, features_until


def pick_teacher(teacher: Any, num_classes: int, *, processor: Any = None) -> Teacher | None:
    """A detector of any supported package as `Teacher`; warns if its number of classes differs.

    Args:
        teacher: a detector of torchvision, transformers, Ultralytics, detectron2 or mmdetection, another module, a
            `Teacher`, or None.
        num_classes: object classes of the data.
        processor: image processor of a teacher of transformers.
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
        picked = transformers_teacher(teacher, processor=processor)
    elif hasattr(teacher, "preprocess_image") and hasattr(teacher, "pixel_mean"):
        classes, normalization = detectron2_classes(teacher), detectron2_normalization(teacher)
        picked = Teacher(teacher, normalization=normalization, num_classes=classes, scores=cell_scores(teacher))
    elif hasattr(teacher, "extract_feat") and hasattr(teacher, "data_preprocessor"):
        classes, normalization = mmdetection_classes(teacher), mmdetection_normalization(teacher)
        picked = Teacher(teacher, normalization=normalization, num_classes=classes, scores=cell_scores(teacher))
    else:
        picked = Teacher(teacher, scores=cell_scores(teacher))
    if picked.num_classes not in (None, num_classes):
        warnings.warn(
            f"fastkd: the teacher knows {picked.num_classes} classes, the student {num_classes}; a teacher teaches "
            "best on the same classes. kd.report() says whether it finds the objects of a batch",
            stacklevel=3,
        )
    return picked


def student_classes(noted: int | None, num_classes: int | None) -> int:
    """The number of object classes of a student.

    Args:
        noted: as the model tells it; None if it does not.
        num_classes: as the user tells it, or None.
    Raises: ValueError if both are None, or they differ.
    """
    classes = noted if num_classes is None else num_classes
    if classes is None:
        raise ValueError("attach: num_classes must be given, as this model does not tell it; pass that of the data")
    if noted not in (None, classes):
        raise ValueError(f"attach: num_classes must be that of the model, {noted}, got {num_classes}; set it there")
    return classes


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


def detectron2_classes(model: Any) -> int | None:
    """Object classes of a detectron2 detector; None if it has no such attribute."""
    return getattr(getattr(model, "roi_heads", model), "num_classes", None)


def detectron2_normalization(model: Any) -> Normalization:
    """Normalisation of a detectron2 detector; its images have values in [0, 255]."""
    return _of_bytes(model.pixel_mean, model.pixel_std)


def mmdetection_classes(model: Any) -> int | None:
    """Object classes of an mmdetection detector; None if its head has no such attribute."""
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None) or getattr(model, "bbox_head", None)
    head = head[0] if isinstance(head, nn.ModuleList) else head  # a cascade's
    return getattr(head, "num_classes", None)


def mmdetection_normalization(model: Any) -> Normalization:
    """Normalisation of an mmdetection detector.

    Images have values in [0, 255] before its preprocessor, and also after it if it has no mean.
    """
    prepare = model.data_preprocessor
    if getattr(prepare, "mean", None) is None:
        return Normalization(std=(1 / 255,) * 3)
    return _of_bytes(prepare.mean, prepare.std)


def _of_bytes(mean: Tensor, std: Tensor) -> Normalization:
    """Normalisation from a mean and a standard deviation [3, 1, 1] for values in [0, 255]."""
    return Normalization(*(tuple((value.flatten() / 255).tolist()) for value in (mean, std)))


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
    """A transformers detector as teacher; its forward pass is stopped after the encoder.

    Args:
        teacher: RT-DETR, RT-DETRv2, D-FINE or Deformable DETR.
        processor: the teacher's image processor; None: it takes images with values in [0, 1].
    """
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


class _UltralyticsTeacher(Teacher):
    """A YOLO's network: it is usually in train mode, and may be in half precision."""

    usually_in_train_mode = True

    def freeze(self) -> None:
        """Eval mode, no gradients, float32."""
        super().freeze()
        self.module.float()


def ultralytics_teacher(teacher: Any) -> Teacher:
    """A YOLO, or its network, as teacher; its forward pass is stopped before the head.

    Raises: TypeError for any other object.
    """
    network = yolo_network(teacher)
    if network is None:
        raise TypeError(f"ultralytics_teacher: teacher must be a YOLO or its network, got {type(teacher).__name__}")
    layers: Any = network.model
    head = layers[-1]
    return _UltralyticsTeacher(
        network,
        features_before(network, head),
        normalization=Normalization(),
        detect=DetectUltralytics(network, head),
        num_classes=head.nc,
        scores=functools.partial(of_ultralytics, head),
    )
