"""The trained detector for use elsewhere: one safetensors file, and an ONNX graph checked against torch.

The graph is `images -> pyramid and raw head outputs`: everything with weights, nothing that depends on the data
(decoding boxes, suppression), which each runtime has its own fast form of. The JSON beside it says how to read it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest value of an output; float32 graphs agree to about 1e-5


@dataclass(frozen=True)
class OnnxReport:
    """How an exported graph compares with torch.

    Args:
        path: the ONNX file.
        outputs: output name -> shape for the example image batch.
        difference: largest absolute difference of any output to torch's, on the shapes tried.
        relative_difference: the same divided by the largest absolute value of that output, the largest over outputs.
        shapes: image batches tried, (B, 3, H, W).
    """

    path: Path
    outputs: dict[str, list[int]]
    difference: float
    relative_difference: float
    shapes: list[tuple[int, ...]]


class RawOutputs(nn.Module):
    """images [B, 3, H, W] -> (P levels ..., raw head outputs ...) of a detector, as a flat tuple."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.detector.features(images)
        return (*pyramid, *(tensor for _, tensor in raw_head_outputs(self.detector, pyramid)))


def raw_head_outputs(detector, pyramid: list[Tensor]) -> list[tuple[str, Tensor]]:
    """What the head's convolutions say of a pyramid, by name; of a two-stage detector its proposal network's."""
    rpn = getattr(detector.head, "rpn", None)
    if rpn is None:
        return list(detector.head(pyramid).items())
    objectness, deltas = getattr(rpn, "head", rpn)(pyramid)
    named = [(f"objectness_{i}", level) for i, level in enumerate(objectness)]
    return named + [(f"proposal_deltas_{i}", level) for i, level in enumerate(deltas)]


def output_names(detector, pyramid: list[Tensor]) -> list[str]:
    """Names of the outputs of RawOutputs: pyramid levels by their stride (p3 has stride 8), then the head's."""
    levels = [f"p{stride.bit_length() - 1}" for stride in detector.strides]
    return levels + [name for name, _ in raw_head_outputs(detector, pyramid)]


def require_onnx() -> None:
    """Raises: ValueError naming the packages of the onnx extra that are missing."""
    missing = [name for name in ONNX_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export: ONNX must have {', '.join(ONNX_MODULES)}, got no {', '.join(missing)}; "
            "pip install 'fastkd[onnx]', or leave ONNX out with --no-onnx"
        )


def export_onnx(detector, path: Path, *, size: tuple[int, int], batch: int = 1, dynamic: bool = True) -> OnnxReport:
    """Write images -> pyramid and raw head outputs as ONNX, and compare it with torch in onnxruntime.

    Args:
        detector: on the CPU or elsewhere; left as it was.
        path: of the .onnx file.
        size: (H, W) of the example image, multiples of the coarsest stride.
        batch: images in the example.
        dynamic: let other batch sizes, heights and widths (multiples of the coarsest stride) through the graph.
    Returns: OnnxReport.
    Raises: ValueError if packages are missing, the size does not fit, or the graph's numbers are not torch's.
    """
    require_onnx()
    coarsest = max(detector.strides)
    if any(side <= 0 or side % coarsest for side in size) or batch < 1:
        raise ValueError(
            f"export_onnx: size must be multiples of {coarsest} (the coarsest stride) and batch at least 1, "
            f"got {size[0]} x {size[1]} and {batch}"
        )
    training, parameter = detector.training, next(detector.parameters())
    device, dtype = parameter.device, parameter.dtype
    detector.eval().to("cpu", torch.float32)
    try:
        return _export_and_check(detector, path, size, batch, dynamic, coarsest)
    finally:
        detector.to(device, dtype).train(training)


def _export_and_check(detector, path, size, batch, dynamic, coarsest) -> OnnxReport:
    module = RawOutputs(detector).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator)
    with torch.no_grad():
        names = output_names(detector, detector.features(images))
    shapes = None
    if dynamic:
        auto = torch.export.Dim.AUTO
        shapes = ({0: auto, 2: auto, 3: auto},)
        # torch.export takes a batch of one for a constant, so the example has two images
        images = torch.randn(max(batch, 2), 3, *size, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=names,
            dynamic_shapes=shapes,
            verbose=False,
        )
        program.save(str(path), external_data=False)
    tried = [images]
    if dynamic:
        tried.append(torch.randn(1, 3, size[0] + coarsest, size[1] + 2 * coarsest, generator=generator))
    return _compare(module, path, names, tried)


def _compare(module: nn.Module, path: Path, names: list[str], tried: list[Tensor]) -> OnnxReport:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = relative = 0.0
    shapes: dict[str, list[int]] = {}
    for images in tried:
        with torch.no_grad():
            expected = module(images)
        found = session.run(names, {"images": images.numpy()})
        for name, ours, theirs in zip(names, expected, found):
            theirs = torch.from_numpy(theirs)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"export_onnx: {name} must have shape {list(ours.shape)} in onnxruntime, got {list(theirs.shape)}"
                )
            shapes.setdefault(name, list(ours.shape))
            difference = (ours - theirs).abs().max().item()
            scale = max(ours.abs().max().item(), 1e-12)
            if not difference <= TOLERANCE * scale:
                raise ValueError(
                    f"export_onnx: {name} must agree with torch to {TOLERANCE:g} of its largest value {scale:.3g}, "
                    f"got a difference of {difference:.3g}; the ONNX file {path} is not usable"
                )
            largest, relative = max(largest, difference), max(relative, difference / scale)
    return OnnxReport(path, shapes, largest, relative, [tuple(images.shape) for images in tried])


class _quiet(warnings.catch_warnings):
    """Keeps the exporter's warnings and log lines (about its own insides) off the terminal."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self._loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error):
        for logger, level in zip(self._loggers, self._levels):
            logger.setLevel(level)
        super().__exit__(*error)
