"""`fastkd predict`: draws a detector's detections on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd.commands.common import (
    ImageSize,
    OwnDetectors,
    choose_device,
    find_checkpoint,
    image_size,
    say,
    use_detectors,
)
from fastkd.files import write_json
from fastkd.progress import track

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def predict(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")],
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")],
    out: Path = Path("predictions"),
    score: float = 0.3,
    short_side: int | None = None,
    max_side: int | None = None,
    device: str = "auto",
    detectors: OwnDetectors = (),
) -> None:
    """Draw the objects a trained detector finds: boxes, masks, class names and scores.

    Args:
        checkpoint: Run directory of fastkd train, or a detector's .safetensors file.
        images: Image files, or folders of images.
        out: Folder for the drawn images and predictions.json.
        score: Minimum score of the detections to draw, 0 to 1.
        short_side: Length of the images' short side, pixels. Default: as in the run's own evaluation.
        max_side: Longest side after resizing, pixels. Default: as in the run's own evaluation.
        device: auto, cpu, cuda or cuda:N.
        detectors: Class of one's own that the checkpoint names; its code is imported only if you name it here, too.
    """
    if not 0 <= score <= 1:
        raise ValueError(f"--score must be in [0, 1], got {score}")
    use_detectors(detectors)
    checkpoint = find_checkpoint(checkpoint)
    files = find_images(images)
    names = output_names(files)

    from fastkd.detectors import load_detector

    where = choose_device(device)
    detector, class_names = load_detector(checkpoint)
    detector = detector.to(where).eval()
    size = image_size(checkpoint, short_side, max_side)
    out.mkdir(parents=True, exist_ok=True)
    found, unreadable = {}, 0
    for path in track(files, "predict", "images"):
        try:
            picture = read_picture(path)
        except ValueError as error:
            say(f"fastkd: {error}; left out")
            unreadable += 1
            continue
        found[str(path)] = predict_one(detector, class_names, picture, out / names[path], size, score, where)
    if not found:
        raise ValueError(f"predict: at least one image must be readable, got {unreadable} that are not")
    write_json(out / "predictions.json", found)
    objects = sum(len(entries) for entries in found.values())
    say(
        f"{objects} objects in {len(found)} images, drawn in {out}" + (f"; {unreadable} left out" if unreadable else "")
    )


def predict_one(detector, class_names, picture, out: Path, size: ImageSize, score: float, device) -> list[dict]:
    """Detect, draw to `out`, and return [{class, score, box xyxy in pixels of the image}]."""
    from fastkd.commands.drawing import draw_detections

    detections = detect(detector, picture, size, device)
    keep = detections.scores >= score
    boxes, scores, labels = (value[keep].numpy() for value in (detections.boxes, detections.scores, detections.labels))
    masks = None if detections.masks is None else detections.masks[keep].numpy()
    draw_detections(picture, boxes, scores, labels, class_names, masks).save(out)
    return [
        {"class": class_names[label], "score": value, "box": box}
        for label, value, box in zip(labels.tolist(), scores.tolist(), boxes.tolist())
    ]


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """The image files among `paths` and directly in the folders among them, without duplicates.

    Raises: ValueError if a path does not exist or there is no image.
    """
    if not paths:
        raise ValueError("IMAGES must be given, got none; pass image files or folders")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"IMAGES must be existing files or folders, got {path}")
    if not files:
        raise ValueError(f"IMAGES must hold at least one image ({', '.join(SUFFIXES)}), got none in {paths[0]}")
    return list(dict.fromkeys(files))


def output_names(files: list[Path]) -> dict[Path, str]:
    """A PNG name for every image; images with equal names get a number."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in files:
        name, number = path.stem, 2
        while name in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name)
        names[path] = f"{name}.png"
    return names


def read_picture(path: Path):
    """Reads an image as RGB, rotated according to its EXIF data.

    Raises: ValueError naming the file if it is not a readable image or too large.
    """
    from PIL import Image, ImageOps

    from fastkd.data.images import FORMATS, MAX_PIXELS

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise many types of exceptions on damaged files
        raise ValueError(f"image {path} cannot be read ({error})") from error


def detect(detector, picture, size: ImageSize, device):
    """Detections of one picture, on the CPU; boxes in pixels of the picture."""
    import numpy as np
    import torch

    from fastkd.data.transforms import Geometry, normalise, resized_size
    from fastkd.evaluation.coco import resize_masks, scale_boxes
    from fastkd.types import Batch, Detections

    height, width = resized_size(picture.width, picture.height, size.short_side, size.max_side)
    padded = [-(-side // size.divisor) * size.divisor for side in (height, width)]
    pixels = np.zeros((*padded, 3), np.float32)
    normalise(Geometry(height, width, False).image(np.asarray(picture)), pixels)
    batch = Batch(
        images=torch.from_numpy(pixels).permute(2, 0, 1)[None],
        image_sizes=torch.tensor([[height, width]]),
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        image_index=torch.zeros(0, dtype=torch.int64),
        counts=[0],
        image_ids=[0],
        original_sizes=torch.tensor([[picture.height, picture.width]]),
        seeds=[0],
    ).to(device)
    with torch.inference_mode():
        found = detector.detect(detector.features(batch.images), batch)[0]
    target = [picture.height, picture.width]
    boxes = scale_boxes(found.boxes.float().cpu(), [height, width], target)
    masks = None if found.masks is None else resize_masks(found.masks.cpu(), target)
    return Detections(boxes, found.scores.float().cpu(), found.labels.cpu(), masks)
