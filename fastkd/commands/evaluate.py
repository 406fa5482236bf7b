"""`fastkd evaluate`: COCO or CrowdHuman metrics of a trained detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastkd.commands.common import (
    OwnDetectors,
    device_argument,
    find_checkpoint,
    image_size,
    require_file,
    require_folder,
    use_detectors,
)
from fastkd.files import write_json, write_json_list


def evaluate(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")],
    annotations: Path,
    images: Path,
    format: Literal["coco", "crowdhuman"] = "coco",
    crowd_boxes: Literal["full", "visible", "head"] = "full",
    out: Path | None = None,
    detections: Path | None = None,
    short_side: int | None = None,
    max_side: int | None = None,
    max_detections: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    batch_size: int = 16,
    workers: int = 1,
    device: str = "auto",
    bf16: bool = False,
    strict: bool = False,
    detectors: OwnDetectors = (),
) -> None:
    """Measure a trained detector on COCO-format data: AP of boxes (and masks), by size and by class.

    With --format crowdhuman: MR^-2, AP and JI on data in CrowdHuman's format.

    In several processes: torchrun --nproc-per-node N -m fastkd.cli evaluate ...

    Args:
        checkpoint: Run directory of fastkd train, or a detector's .safetensors file.
        annotations: Annotation file: COCO JSON, or odgt.
        images: Folder of its images.
        format: Format of the annotation file.
        crowd_boxes: The boxes of the crowdhuman format that are used as objects.
        out: Write the metrics to this JSON file.
        detections: Write the detections, in COCO's result format, to this JSON file.
        short_side: Length of the images' short side, pixels. Default: as in the run's own evaluation.
        max_side: Longest side after resizing, pixels. Default: as in the run's own evaluation.
        max_detections: Highest-scoring detections of an image to evaluate. Default: 100, crowdhuman 500.
        batch_size: Images per batch.
        workers: Number of processes that read images.
        device: auto, cpu, cuda or cuda:N.
        bf16: Compute in bfloat16 (autocast).
        strict: Raise an error on a bad box or image instead of skipping and counting it.
        detectors: Class of one's own that the checkpoint names; its code is imported only if you name it here, too.
    """
    use_detectors(detectors)
    checkpoint = find_checkpoint(checkpoint)
    require_file(annotations, "--annotations")
    require_folder(images, "--images")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"--max-detections must be at least 1, got {max_detections}")

    import torch

    from fastkd.data import build_eval_loader, explaining_dead_workers, open_dataset
    from fastkd.detectors import load_detector
    from fastkd.evaluation import evaluate as run
    from fastkd.evaluation import evaluator_of, print_metrics
    from fastkd.training.parallel.processes import processes

    detector, class_names = load_detector(checkpoint)
    masks = detector.config.with_masks and format == "coco"
    dataset = open_dataset(format, annotations, images, strict=strict, with_masks=masks, crowd_boxes=crowd_boxes)
    require_same_classes(class_names, dataset.class_names, checkpoint, annotations)
    size = image_size(checkpoint, short_side, max_side)
    with processes(device_argument(device)) as group, explaining_dead_workers():
        loader = build_eval_loader(
            dataset,
            batch_size=batch_size,
            world_size=group.world_size,
            rank=group.rank,
            workers=workers,
            short_side=size.short_side,
            max_side=size.max_side,
            divisor=size.divisor,
        )
        evaluator = evaluator_of(dataset, max_detections)
        dtype = torch.bfloat16 if bf16 else None
        metrics = run(detector.to(group.device), loader, evaluator, device=group.device, dtype=dtype)
        if not group.first:
            return
    print_metrics(metrics)
    if out is not None:
        write_json(out, metrics)
    if detections is not None:
        write_json_list(detections, evaluator.iterate_results())


def require_same_classes(ours: list[str], theirs: list[str], checkpoint: Path, annotations: Path) -> None:
    """Raises ValueError with the differences unless detector and data have the same classes in the same order."""
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        raise ValueError(
            f"evaluate: {annotations} must have the detector's {len(ours)} classes, got {len(theirs)}; "
            f"{checkpoint} was trained on other data"
        )
    label = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    raise ValueError(
        f"evaluate: {annotations} must have the classes of {checkpoint} in the same order, got {theirs[label]!r} "
        f"for {ours[label]!r} (class {label})"
    )
