"""Loading and saving weights: backbone files, inheriting from a teacher, and complete detectors in one file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastkd.detectors.backbones.base import Backbone
from fastkd.detectors.build import build_detector
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector
from fastkd.files import replacing
from fastkd.tensor_files import save_tensor_file

FORMAT = "fastkd-detector-1"
_PREFIXES = ("backbone.body.", "backbone.", "body.", "module.")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MatchReport:
    """Which tensors of a weight file or a teacher were copied.

    Args:
        matched: names copied.
        missing: names only in the target.
        unexpected: names only in the source.
        mismatched: (name, shape in the target, shape in the source) of common names with different shapes.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the target was filled."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.matched)} of {total} tensors"]
        shapes = [f"{name} (needs {list(own)}, got {list(other)})" for name, own, other in self.mismatched]
        for word, names in (("missing", self.missing), ("other shape", shapes), ("not used", self.unexpected)):
            if names:
                lines.append(f"  {word}: {_listed(names)}")
        return "\n".join(lines)


def load_backbone_weights(detector: Detector, path: str | os.PathLike, *, strict: bool = True) -> MatchReport:
    """Load the detector's backbone from a local weight file with torchvision's names.

    Names may be those of a torchvision classifier (conv1.weight, ...; fc is not used), of a torchvision detector
    (backbone.body.conv1.weight, ...) or of timm. Parameters that no classifier has (offsets of deformable convolutions,
    the norms on Swin's maps) keep their initialisation. Only tensors are unpickled; nothing is downloaded.

    Args:
        path: a .safetensors file, or a .pth or .pt file of torch.save.
        strict: raise if a tensor of the backbone is missing in the file or has another shape.
    Returns: a report of the tensors.
    Raises: FileNotFoundError; ValueError if the file is not readable, not a state dict, has non-finite values, matches
        no tensor, or (strict) not every tensor. On an error the detector is unchanged.
    """
    source = read_state_dict("load_backbone_weights", Path(path))
    backbone = detector.parts()["backbone"]
    target = backbone.state_dict()
    if isinstance(backbone, Backbone):
        source = {backbone.own_name(name, target): value for name, value in source.items()}
    source = {_plain_name(name, target): value for name, value in source.items()}
    fresh = backbone.fresh if isinstance(backbone, Backbone) else ()
    target = {name: value for name, value in target.items() if name in source or not name.endswith(fresh)}
    pairs, report = match_tensors(target, source)
    config = detector.config
    name = f"backbone of {config.custom}" if config.custom else config.backbone
    if not pairs:
        raise ValueError(f"load_backbone_weights: no tensor of {path} fits a {name}; {report}")
    if strict and not report.complete:
        raise ValueError(
            f"load_backbone_weights: {path} does not fill a {name} of width {config.width} with norm {config.norm}: "
            f"{report}\n"
            "use the file of that backbone, or strict=False to take what fits"
        )
    check_finite("load_backbone_weights", path, {name: source[name] for name in pairs})
    copy_tensors(target, source, pairs)
    return report


def inherit(student: Detector, teacher: Detector) -> MatchReport:
    """Initialise the student's neck and head from the teacher's where names and shapes agree (ICD's inheriting).

    Returns: a report of the tensors, with names starting with neck. and head.
    Raises: ValueError if no tensor agrees.
    Source: Instance-Conditional Knowledge Distillation (Kang et al., NeurIPS 2021).
    """
    target, source = _neck_and_head(student), _neck_and_head(teacher)
    pairs, report = match_tensors(target, source)
    if not pairs:
        raise ValueError(f"inherit: no tensor of the teacher's neck and head fits the student's; {report}")
    copy_tensors(target, source, pairs)
    return report


def check_teacher(student: Detector, teacher: Detector, *, same_channels: bool = False) -> None:
    """Raise unless teacher and student have the same classes and pyramid strides.

    Args:
        same_channels: also require the same number of channels (not needed by distillers with `teacher_channels`).
    Raises: ValueError naming the difference.
    """
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"check_teacher: teacher must have the student's {student.num_classes} classes, got {teacher.num_classes}; "
            "train the teacher on the same data"
        )
    if tuple(teacher.strides) != tuple(student.strides):
        raise ValueError(
            f"check_teacher: teacher's pyramid must have the student's strides {tuple(student.strides)}, got "
            f"{tuple(teacher.strides)}; pair one-stage with one-stage and two-stage with two-stage detectors"
        )
    if same_channels and teacher.channels != student.channels:
        raise ValueError(
            f"check_teacher: teacher's pyramid must have the student's {student.channels} channels, got "
            f"{teacher.channels}; train either with the other's `channels`"
        )


def save_detector(
    detector: Detector, path: str | os.PathLike, class_names: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Atomically save a detector to one safetensors file, with its configuration and class names in the header.

    Args:
        class_names: one per class, in label order.
        dtype: float32, float16 or bfloat16 (half the size); integer tensors keep their dtype.
    Raises: ValueError for another dtype, a wrong number of names, or non-finite weights.
    """
    names = [str(name) for name in class_names]
    if len(names) != detector.num_classes:
        raise ValueError(f"save_detector: class_names must hold {detector.num_classes} names, got {len(names)}")
    if dtype not in _DTYPES:
        raise ValueError(f"save_detector: dtype must be float32, float16 or bfloat16, got {dtype}")
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in detector.state_dict().items()
    }
    check_finite(f"save_detector: as {dtype}", path, tensors)
    header = {"format": FORMAT, "config": json.dumps(detector.config.to_dict()), "class_names": json.dumps(names)}
    with replacing(Path(path)) as temporary:
        save_tensor_file(temporary, tensors, header)


def load_detector(path: str | os.PathLike) -> tuple[Detector, list[str]]:
    """Load a file written by `save_detector`: the detector, float32, in eval mode on the CPU, and its class names.

    Raises: FileNotFoundError; ValueError if the file is damaged, of another kind, or does not fit its configuration.
    """
    path = Path(path)
    header, tensors = _read_safetensors("load_detector", path)
    if header.get("format") != FORMAT:
        raise ValueError(f"load_detector: {path} must be written by save_detector, its header has no format {FORMAT}")
    try:
        config = DetectorConfig.from_dict(json.loads(header["config"]))
        names = [str(name) for name in json.loads(header["class_names"])]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"load_detector: the header of {path} is not readable: {error}") from error
    if len(names) != config.num_classes:
        raise ValueError(f"load_detector: {path} must name its {config.num_classes} classes, got {len(names)} names")
    check_finite("load_detector", path, tensors)
    pairs = _check_fits(config, tensors, path)
    with torch.random.fork_rng(devices=[]):  # the random initialisation must not advance the global generator
        detector = build_detector(config)
    copy_tensors(detector.state_dict(), tensors, pairs)
    return detector.eval(), names


def _check_fits(config: DetectorConfig, tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """Compare shapes before allocating memory: a forged header may request any size."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            target = build_detector(config).state_dict()
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"load_detector: the configuration in {path} cannot be built: {_first_line(error)}") from error
    pairs, report = match_tensors(target, tensors)
    if not report.complete or report.unexpected:
        raise ValueError(f"load_detector: the tensors of {path} do not fit its configuration: {report}")
    return pairs


def _neck_and_head(detector: Detector) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = detector.parts()
    return {f"{part}.{name}": value for part in ("neck", "head") for name, value in parts[part].state_dict().items()}


def _plain_name(name: str, known: Mapping[str, Tensor]) -> str:
    shorter = name
    while shorter not in known:
        prefix = next((prefix for prefix in _PREFIXES if shorter.startswith(prefix)), None)
        if prefix is None:
            return name
        shorter = shorter[len(prefix) :]
    return shorter


def match_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> tuple[list[str], MatchReport]:
    """Names with equal shapes in both, and the report of all names."""
    both = [name for name in target if name in source]
    agree = [name for name in both if target[name].shape == source[name].shape]
    mismatched = [
        (name, tuple(target[name].shape), tuple(source[name].shape)) for name in both if name not in set(agree)
    ]
    # BatchNorm counters are not weights: old files and frozen norms do not have them
    missing = [name for name in target if name not in source and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in source if name not in target and not name.endswith("num_batches_tracked")]
    return agree, MatchReport(tuple(agree), tuple(missing), tuple(unexpected), tuple(mismatched))


@torch.no_grad()
def copy_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Copy the named tensors of `source` into those of `target`."""
    for name in names:
        target[name].copy_(source[name])  # state_dict() shares memory with the module


def check_finite(who: str, path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the prefix `who`, if a value is infinite or NaN."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{who}: weights must be finite, got inf or nan in {_listed(bad)} ({path})")


def read_state_dict(who: str, path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors, .pth or .pt file, unwrapped; nothing else is read.

    Raises: FileNotFoundError, ValueError, with the prefix `who`.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(who, path)[1]
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{who}: path must end in .safetensors, .pth or .pt, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{who}: {path} is not a file")
    try:
        _refuse_compressed(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged input the unpickler may raise almost any exception
        raise ValueError(f"{who}: {path} is damaged or holds more than tensors: {_first_line(error)}") from error
    while isinstance(values, Mapping):
        inner = next((values[key] for key in _WRAPPERS if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            break
        values = inner
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{who}: {path} must hold a state dict, got {type(values).__name__}")
    tensors = {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{who}: {path} must hold named tensors, got none")
    return tensors


def _refuse_compressed(path: Path) -> None:
    """Raises ValueError if members of the file, a zip, are compressed: torch.save's never are, but a bomb's."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which torch.save never does")


def _read_safetensors(who: str, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{who}: {path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return header, load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{who}: {path} is damaged or no safetensors file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _listed(names: Sequence[str], most: int = 6) -> str:
    names = [f"{name:.150}" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
