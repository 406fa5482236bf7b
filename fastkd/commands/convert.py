"""`fastkd convert`: published detectors as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd.commands.common import require_file, say
from fastkd.progress import showing


def convert(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    out: Path,
    annotations: Path | None = None,
    norm_eps: float | None = None,
) -> None:
    """Convert a detector of torchvision or detectron2 to fastkd's format, e.g. a published R101 teacher.

    Supports RetinaNet, Faster R-CNN and Mask R-CNN with ResNet-50 or -101 and FPN. No code in the file is executed.
    Use the result with --teacher, evaluate, predict and export like any detector trained with fastkd.

    Args:
        checkpoint: .pth, .pt or .safetensors, or detectron2's model_final_*.pkl.
        out: File to write, .safetensors.
        annotations: COCO annotation file whose categories name the classes. Default: COCO's 80 classes.
        norm_eps: Eps of the original's frozen batch norms. Default: 0 for torchvision's COCO models, else 1e-5.
    """
    require_file(checkpoint, "FILE")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    names = None
    if annotations is not None:
        from fastkd.data.annotations import read_class_names

        names = read_class_names(require_file(annotations, "--annotations"))

    from fastkd.detectors import convert_checkpoint, save_detector

    with showing("convert", "files", total=2) as work:
        found = convert_checkpoint(checkpoint, names, norm_eps=norm_eps)
        work.advance()
        out.parent.mkdir(parents=True, exist_ok=True)
        save_detector(found.detector, out, found.class_names)
    config = found.detector.config
    say(f"{checkpoint}: {found.origin}'s {config.detector} with {config.backbone}, {config.num_classes} classes")
    say(f"matched {found.report}")
    for note in found.notes:
        say(f"  {note}")
    changed = {
        name: value
        for name, value in config.to_dict().items()
        if name in ("p6_source", "anchor_rounding", "roi_aligned", "head_norm")  # fields of neck and head
        and value != type(config)(detector=config.detector).to_dict()[name]
    }
    if changed:
        options = " ".join(_option(name, value) for name, value in changed.items())
        say(f"a student that is to inherit all of its neck and head needs: {options}")
    say(f"wrote {out}; use it with --teacher {out}")


def _option(name: str, value) -> str:
    """The command-line option of `fastkd train` for a field of the detector."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--detector.{flag}" if value else f"--detector.no-{flag}"
    return f"--detector.{flag} {value}"
