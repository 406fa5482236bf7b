"""Report on a method in a host: its gradients at the student's levels, and warnings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.integrations.teachers import pixels
from fastkd.types import Batch

if TYPE_CHECKING:
    from fastkd.integrations.attachment import Distillation, HostStep
    from fastkd.integrations.teachers import Normalization, Teacher

SETTLED = 64  # number of batches from which the gradient shares are reliable
TOO_WEAK, TOO_STRONG = 0.001, 0.9  # limits of a loss's share of the gradient at the levels
KNOWN_SCORE, KNOWN_IOU = 0.3, 0.5
MANY_ZEROED = 0.1  # share of the steps; in the first ones a GradScaler still lowers its scale


class Probe:
    """Measures the gradients of the losses at the student's levels in batches 1, 2, 4, 8, ..."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.sizes: dict[str, list[tuple[int, ...]]] = {}
        self.norms: dict[str, list[Tensor]] = {}
        self.total: list[Tensor | None] = []
        self.factors: dict[str, Tensor] = {}  # by which the host multiplied a loss: GradScaler, batch size, ...
        self.values: dict[str, Tensor] = {}
        self.measured = 0

    def due(self, computed: int) -> bool:
        """Whether batch number `computed`, from 1, is measured."""
        return computed & (computed - 1) == 0

    def measure(self, number: int, losses: dict[str, Tensor], levels: Sequence[Tensor], step: HostStep) -> None:
        """Measures gradient norms of each loss of batch `number` at each level; the total in the backward pass."""
        wanted = [level for level in levels if level.requires_grad]
        if not wanted:
            return
        self.batch, self.norms, self.measured = step.batch, {}, number
        self.values = {name: loss.detach() for name, loss in losses.items()}
        self.sizes = {"student": [tuple(level.shape[1:]) for level in levels]}
        if step.teacher is not None:
            self.sizes["teacher"] = [tuple(level.shape[1:]) for level in step.teacher]
        for name, loss in losses.items():
            grads: Sequence[Tensor | None] = [None] * len(wanted)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            self.norms[name] = [loss.new_zeros(()) if grad is None else grad.float().norm() for grad in grads]
        self.total, self.factors = [None] * len(wanted), {}
        for name, loss in losses.items():
            if loss.requires_grad:  # after the measurement above, which is not the host's backward pass
                loss.register_hook(functools.partial(self.factors.__setitem__, name))
        for index, level in enumerate(wanted):
            level.register_hook(_Norm(self.total, index))

    @torch.no_grad()
    def text(
        self,
        distillation: Distillation,
        teacher: Teacher | None = None,
        normalization: Normalization | None = None,
        failures: int = 0,
    ) -> str:
        """The report: shapes, matched levels, losses, gradients by level, the teacher's detections, and warnings."""
        if self.batch is None or distillation.network is None:
            return "fastkd: no batch has been distilled yet. Train a step in train mode with gradients first."
        network, lines, wrong = distillation.network, [], []
        parameters = sum(parameter.numel() for parameter in network.parameters())
        lines.append(
            f"fastkd: {type(network.method).__name__}, {parameters / 1e6:.2f} M parameters of its own, "
            f"{distillation.computed} batches, {distillation.steps} steps"
        )
        lines += [f"{name} levels (C, H, W): {sizes}" for name, sizes in self.sizes.items()]
        if network.spec.teacher:
            lines.append(f"levels matched (student, teacher): {list(network.spec.pairs)}")
            scale = getattr(network.method, "teacher_scale", None)
            if distillation.teacher_scale != 1 and scale is not None:
                size = 1 / distillation.teacher_scale
                lines.append(
                    f"root mean square of the teacher's levels: {size:.2g}, times {scale:.2g} in ICD's attention"
                )
                if scale == 1:
                    wrong.append(f"ICD's attention saturates: give it teacher_scale={distillation.teacher_scale:.2g}")
            if len(network.spec.pairs) < len(network.spec.student):
                wrong.append("some levels of the student have no partner in the teacher and are not distilled")
        lines += self._gradient_lines(wrong)
        if teacher is not None and teacher.detect is None:
            lines.append("whether the teacher finds the objects is unknown: pass Teacher(module, detect=...)")
        elif teacher is not None and teacher.detect is not None and normalization is not None:
            images = pixels(self.batch.images, self.batch.image_sizes, normalization)
            lines.append(self._teacher_line(teacher.detect(images), wrong))
        if distillation.computed and not distillation.steps:
            wrong.append("kd.step() was never called: call it after optimizer.step()")
        record, steps = network.record, distillation.steps
        if zeroed := int(record.zeroed_steps):
            lines.append(f"steps in which a gradient was not finite and counted as zero: {zeroed} of {steps}")
            if zeroed > MANY_ZEROED * steps:
                wrong.append("gradients are often not finite: use bfloat16 in place of float16, or lower `weight`")
        if unused := self._without_gradient(distillation):
            wrong.append(f"no gradient reached these parameters of the method in the last step: {', '.join(unused)}")
        if failures:
            wrong.append(f"the last {failures} batches failed; see the warnings")
        lines.append("looks wrong: " + "; ".join(wrong) if wrong else "nothing looks wrong")
        return "\n".join(lines)

    def _without_gradient(self, distillation: Distillation) -> list[str]:
        """Names of the method's parameters that had no gradient in the last step."""
        assert distillation.network is not None and distillation.optimizer is not None
        named = [name for name, each in distillation.network.named_parameters() if each.requires_grad]
        return [named[index] for index in distillation.optimizer.without_gradient]

    def _gradient_lines(self, wrong: list[str]) -> list[str]:
        lines, reached = [], False
        total = [None if norm is None else float(norm) for norm in self.total]
        for name, norms in self.norms.items():
            values = [self._factor(name) * float(norm) for norm in norms]
            shares = [f"{v / t:.3f}" if t else f"|{v:.2e}|" for v, t in zip(values, total)]
            lines.append(f"{name} = {float(self.values[name]):.4f}, gradient by level: {' '.join(shares)}")
            reached |= any(value > 0 for value in values)
            if not torch.isfinite(self.values[name]):
                wrong.append(f"{name} is not finite")
        lines.append("(shares of the gradient norm of all losses together at that level; |norm| before backward)")
        if not reached:
            wrong.append("no loss reaches the student yet, as in the first part of the run, or its levels are detached")
        for share, text in self._extremes(total):
            wrong.append(f"{text} ({share:.3f} of the gradient)")
        return lines

    def _factor(self, name: str) -> float:
        """The host's factor on a loss; 1 before the backward pass."""
        return float(self.factors[name].abs()) if name in self.factors else 1.0

    def _extremes(self, total: list[float | None]) -> list[tuple[float, str]]:
        """Losses with too large or too small a share of the gradient, on the whole or at single levels."""
        distilled = [name for name in self.norms if name.endswith(("distill", "imitation"))]
        whole = [norm for norm in total if norm]
        if self.measured < SETTLED or not distilled or not whole or len(whole) < len(total):
            return []
        ours = [0.0] * len(whole)
        for name in distilled:
            for level, norm in enumerate(self.norms[name]):
                ours[level] += self._factor(name) * float(norm)
        share = sum(ours) / sum(whole)
        if share > TOO_STRONG:
            return [(share, "the distillation swamps the detection loss: lower `weight`")]
        if 0 < share < TOO_WEAK:
            return [(share, "the distillation hardly moves the student: raise `weight`")]
        swamped = [level for level, norm in enumerate(whole) if ours[level] > TOO_STRONG * norm]
        if swamped:
            numbers, least = ", ".join(map(str, swamped)), min(ours[level] / whole[level] for level in swamped)
            text = f"the detection loss hardly uses level {numbers}, and the distillation is nearly alone there"
            return [(least, f"{text}: are there objects of that size?")]
        return []

    def _teacher_line(self, detections: Sequence[tuple[Tensor, Tensor, Tensor]], wrong: list[str]) -> str:
        found, boxes = count_detected(self.batch, detections)
        if boxes and found < 0.2 * boxes:
            wrong.append("the teacher hardly finds these objects: was it trained on these classes and label numbers?")
        return f"the teacher finds {found} of the {boxes} objects of the batch (IoU > {KNOWN_IOU}, same class)"


class _Norm:
    """A gradient hook that records the norm."""

    def __init__(self, norms: list[Tensor | None], index: int):
        self.norms, self.index = norms, index

    def __call__(self, grad: Tensor) -> None:
        self.norms[self.index] = grad.detach().float().norm()


def count_detected(batch: Any, detections: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[int, int]:
    """Number of objects of a batch that are detected with their class, and number of all objects."""
    found = 0
    for image, (boxes, labels, scores) in enumerate(detections):
        keep, own = scores > KNOWN_SCORE, batch.image_index == image
        found += int((_has_match(batch.boxes[own], batch.labels[own], boxes[keep], labels[keep])).sum())
    return found, len(batch.boxes)


def _has_match(truth: Tensor, classes: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Whether each object [K] has a detection of its class with enough overlap: [K] bool."""
    corner = torch.maximum(truth[:, None, :2], boxes[None, :, :2])
    inter = (torch.minimum(truth[:, None, 2:], boxes[None, :, 2:]) - corner).clamp(min=0).prod(2)
    areas = [(value[:, 2:] - value[:, :2]).prod(1) for value in (truth, boxes)]
    iou = inter / (areas[0][:, None] + areas[1] - inter).clamp(min=1e-9)
    return ((iou > KNOWN_IOU) & (classes[:, None] == labels)).any(1)
