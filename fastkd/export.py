"""Exports a trained detector: ONNX graphs checked against torch, and a JSON description of their inputs and outputs.

A graph contains all layers with weights. Data-dependent operations (box decoding, NMS, RoI pooling) are left to the
runtime, which has fast implementations:

    model.onnx          images -> pyramid and raw outputs of the head (two-stage: of the proposal network)
    model-regions.onnx  two-stage: pooled regions -> class logits and box deltas
    model-masks.onnx    Mask R-CNN: pooled regions -> mask logits
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.detectors.own import OwnDetector
from fastkd.files import replacing
from fastkd.progress import Work, showing

ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # relative to the largest value of an output; float32 graphs agree to about 1e-5
REGIONS_TRIED = 5


@dataclass(frozen=True)
class OnnxReport:
    """Comparison of an exported graph with torch.

    Args:
        path: the ONNX file.
        inputs: input name -> shape of the example.
        outputs: output name -> shape for that example.
        difference: largest absolute difference between onnxruntime and torch, over all outputs and test inputs.
        relative_difference: the same, divided by the largest absolute value of the output.
        tried: shapes of the test inputs.
    """

    path: Path
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    difference: float
    relative_difference: float
    tried: list[tuple[int, ...]]


class RawOutputs(nn.Module):
    """images [B, 3, H, W] -> (pyramid levels ..., raw head outputs ...) of a detector, as a flat tuple."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.detector.features(images)
        return (*pyramid, *(tensor for _, tensor in raw_head_outputs(self.detector, pyramid)))


def check_graph(detector) -> None:
    """Raises: ValueError for a detector of one's own, whose head may answer with anything."""
    if isinstance(detector, OwnDetector):
        raise ValueError(
            f"export_onnx: detector must be one of fastkd's, got {detector.config.kind}; pass --no-onnx and export its "
            "graph with torch.onnx"
        )


def raw_head_outputs(detector, pyramid: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The raw outputs of the head on a pyramid, by name; for a two-stage detector those of the RPN."""
    if not detector.config.two_stage:
        return list(detector.head(pyramid).items())
    objectness, deltas = detector.head.rpn.head(pyramid)
    levels = level_names(detector)
    named = [(f"objectness_{level}", tensor) for level, tensor in zip(levels, objectness)]
    return named + [(f"proposal_deltas_{level}", tensor) for level, tensor in zip(levels, deltas)]


def level_names(detector) -> list[str]:
    """Names of the levels: p3 for stride 8, p4 for stride 16, ..."""
    return [f"p{stride.bit_length() - 1}" for stride in detector.strides]


class RegionOutputs(nn.Module):
    """Pooled regions [R, C, 7, 7] -> (class logits [R, K + 1], 0 is background; box deltas [R, 4 * (K + 1)])."""

    def __init__(self, heads):
        super().__init__()
        self.box_head, self.box_predictor = heads.box_head, heads.box_predictor

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(regions))


class MaskOutputs(nn.Module):
    """Pooled regions [R, C, 14, 14] -> mask logits [R, K + 1, 28, 28]."""

    def __init__(self, heads):
        super().__init__()
        self.mask_head, self.mask_predictor = heads.mask_head, heads.mask_predictor

    def forward(self, regions: Tensor) -> Tensor:
        return self.mask_predictor(self.mask_head(regions))


def require_onnx() -> None:
    """Raises: ValueError naming the packages of the onnx extra that are missing."""
    missing = [name for name in ONNX_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export: ONNX must have the packages {', '.join(ONNX_MODULES)}, got no {', '.join(missing)}; "
            "pip install 'fastkd[onnx]', or leave ONNX out with --no-onnx"
        )


def export_onnx(detector, folder: Path, *, size: tuple[int, int], dynamic: bool = True) -> list[OnnxReport]:
    """Write a detector's graphs as ONNX and compare each with torch in onnxruntime.

    Args:
        detector: on any device, in any mode; not changed. The graphs are float32.
        folder: output folder for model.onnx (and model-regions.onnx, model-masks.onnx).
        size: (H, W) of the example image, multiples of the coarsest stride.
        dynamic: model.onnx takes any batch size, and any height and width that are multiples of the coarsest stride;
            otherwise exactly one image of `size`.
    Returns: a report for each graph.
    Raises: ValueError if packages are missing, the size does not fit, or a graph's results differ from torch's; the
        file of such a graph is deleted.
    """
    require_onnx()
    check_graph(detector)
    check_size(detector, size)
    training, parameter = detector.training, next(detector.parameters())
    device, dtype = parameter.device, parameter.dtype
    folder.mkdir(parents=True, exist_ok=True)
    detector.eval().to("cpu", torch.float32)
    try:
        graphs = 1 if not detector.config.two_stage else 3 if detector.config.detector == "mask_rcnn" else 2
        with showing("export", "parts", 2 * graphs) as work:  # of each graph: writing and comparing
            reports = [_images_graph(detector, folder / "model.onnx", size, dynamic, work)]
            return reports + _region_graphs(detector, folder, work)
    finally:
        detector.to(device, dtype).train(training)


def check_size(detector, size: tuple[int, int]) -> None:
    """Raises ValueError unless (H, W) are positive multiples of the detector's coarsest stride."""
    coarsest = max(detector.strides)
    if any(side <= 0 or side % coarsest for side in size):
        raise ValueError(
            f"export_onnx: size must be multiples of the coarsest stride {coarsest}, got {size[0]} x {size[1]}; "
            f"try {-(-max(size[0], 1) // coarsest) * coarsest} x {-(-max(size[1], 1) // coarsest) * coarsest}"
        )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _images_graph(detector, path: Path, size: tuple[int, int], dynamic: bool, work: Work) -> OnnxReport:
    coarsest = max(detector.strides)
    # torch.export treats a batch size of 1 as a constant, so a dynamic graph is traced with two images
    examples = [_random(2 if dynamic else 1, 3, *size)]
    if dynamic:
        examples.append(_random(1, 3, size[0] + coarsest, size[1] + 2 * coarsest))
    with torch.no_grad():
        heads = raw_head_outputs(detector, detector.features(examples[0]))
    names = level_names(detector) + [name for name, _ in heads]
    free = (0, 2, 3) if dynamic else ()
    return _write_graph(RawOutputs(detector), path, "images", names, examples, free, work)


def _region_graphs(detector, folder: Path, work: Work) -> list[OnnxReport]:
    if not detector.config.two_stage:
        return []
    heads, reports = detector.head.roi_heads, []

    def write(module: nn.Module, file: str, side: int, names: list[str]) -> None:
        examples = [_random(count, detector.channels, side, side) for count in (REGIONS_TRIED, 1)]
        reports.append(_write_graph(module, folder / file, "regions", names, examples, (0,), work))

    write(RegionOutputs(heads), "model-regions.onnx", 7, ["class_logits", "box_deltas"])
    if detector.config.detector == "mask_rcnn":
        write(MaskOutputs(heads), "model-masks.onnx", 14, ["mask_logits"])
    return reports


def _write_graph(
    module: nn.Module,
    path: Path,
    name: str,
    names: list[str],
    examples: list[Tensor],
    free: tuple[int, ...],
    work: Work,
) -> OnnxReport:
    """Trace with the first example, write, compare on all examples. `free` are the dynamic dimensions of the input."""
    module = module.eval()
    shapes = ({dimension: torch.export.Dim.AUTO for dimension in free},) if free else None
    with replacing(path) as partial:
        with _quiet():
            program = torch.onnx.export(
                module,
                (examples[0],),
                dynamo=True,
                input_names=[name],
                output_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
            assert program is not None  # guaranteed by dynamo=True
            program.save(str(partial), external_data=False)
        work.advance()
        report = _compare(module, partial, path, name, names, examples)
        work.advance()
        return report


def _compare(module, written: Path, path: Path, name: str, names: list[str], examples: list[Tensor]) -> OnnxReport:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    largest = relative = 0.0
    shapes: dict[str, list[int]] = {}
    for example in examples:
        with torch.no_grad():
            expected = module(example)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        for output, ours, found in zip(names, expected, session.run(names, {name: example.numpy()})):
            theirs = torch.from_numpy(found)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"export_onnx: {output} of {path.name} must have the shape {list(ours.shape)} in onnxruntime, "
                    f"got {list(theirs.shape)}"
                )
            difference = (ours - theirs).abs().max().item()
            scale = max(ours.abs().max().item(), 1e-12)
            if not difference <= TOLERANCE * scale:  # also NaN
                raise ValueError(
                    f"export_onnx: {output} of {path.name} must agree with torch to {TOLERANCE:g} of its largest value "
                    f"{scale:.3g}, got a difference of {difference:.3g}; the graph was not kept"
                )
            shapes.setdefault(output, list(ours.shape))
            largest, relative = max(largest, difference), max(relative, difference / scale)
    return OnnxReport(
        path, {name: list(examples[0].shape)}, shapes, largest, relative, [tuple(e.shape) for e in examples]
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporter's messages and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _anchors(detector) -> list[list[list[float]]]:
    """The anchors of the cell at the origin, level by level; none for SOLOv2."""
    return [anchors.tolist() for anchors in detector.imitation_anchors()] or [[] for _ in detector.strides]


def description(detector, class_names: list[str], reports: list[OnnxReport]) -> dict[str, Any]:
    """The content of model.json: everything needed to use the exported files."""
    from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD

    return {
        "detector": detector.config.to_dict(),
        "class_names": list(class_names),
        "images": {
            "layout": "[batch, RGB, height, width] float32, zero in the padding",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "normalisation": "(value - mean) / std of values 0 .. 255",
            "sides_are_multiples_of": max(detector.strides),
        },
        "levels": [
            {"name": name, "stride": stride, "anchors_at_the_origin_xyxy": anchors}
            for name, stride, anchors in zip(level_names(detector), detector.strides, _anchors(detector))
        ],
        "graphs": {
            report.path.name: {
                "inputs": report.inputs,
                "outputs": report.outputs,
                "compared_with_torch_on": [list(shape) for shape in report.tried],
                "largest_difference": report.difference,
                "largest_relative_difference": report.relative_difference,
            }
            for report in reports
        },
    }
