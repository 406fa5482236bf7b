"""Calls at the limits of launches: shared memory, grid sizes, empty inputs, many levels, large batches.

Each is compared with the reference in float32. A rejected launch raises and is recorded with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.stages import Context
from benchmarks.step.steps import Step, assert_same
from fastkd import ops

IMAGE = (256, 256)


class Cases:
    """Named calls; each raises if results or gradients differ from the reference.

    Args:
        device: of the tensors. toy: a few objects and cells.
    """

    def __init__(self, device: str, toy: bool):
        self.device, self.toy = torch.device(device), toy
        self.channels = 8 if toy else 256
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, *sizes: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
        value = torch.randn(sizes, generator=self.generator).to(self.device, dtype)
        return (value.contiguous(memory_format=torch.channels_last) if last else value).requires_grad_()

    def boxes(self, count: int, images: int = 1) -> tuple[Tensor, Tensor]:
        low = torch.rand(count, 2, generator=self.generator) * 128
        side = 8 + torch.rand(count, 2, generator=self.generator) * 120
        index = torch.arange(count) % images
        return torch.cat([low, low + side], dim=1).to(self.device), index.sort().values.to(self.device)

    def compare(self, op: str, call: Callable, arguments: tuple, dtype: torch.dtype) -> str:
        """Compare `call(function, *arguments)` for the op and, in float32, for its reference."""

        def wide(value):
            if isinstance(value, Tensor):
                return value.detach().float().requires_grad_(value.requires_grad)
            return [wide(one) for one in value]

        ours = Step(lambda *given: call(getattr(ops, op), *given), arguments)
        exact = Step(lambda *given: call(getattr(ops, f"{op}_reference"), *given), tuple(map(wide, arguments)))
        assert_same(ours, exact, dtype)
        return "ok"

    def pool(self, op: str, count: int, dtype: torch.dtype, last: bool) -> str:
        boxes, index = self.boxes(count)
        levels = [self.tensor(1, self.channels, side, side, dtype=dtype, last=last) for side in (32, 16)]
        return self.compare(op, lambda f, levels: f(levels, boxes, index, IMAGE), (levels,), dtype)

    def taps(self, count: int, dtype: torch.dtype) -> str:
        """Compare the nine taps of box_paint_conv3x3 and their gradients."""
        boxes, index = self.boxes(count)
        channels = self.channels
        arguments = (
            self.tensor(2, count, channels, dtype=dtype),
            self.tensor(channels, channels, 3, 3, dtype=dtype),
            self.tensor(channels, dtype=dtype),
        )
        sizes = [(32, 32), (16, 16)]
        call = lambda f, *given: f(*given, boxes, index, IMAGE, 1, sizes)  # noqa: E731
        return self.compare("box_paint_conv3x3", call, arguments, dtype)

    def norm(self, sizes: list[tuple[int, int]], dtype: torch.dtype, images: int = 1, last: bool = False) -> str:
        levels = [self.tensor(images, self.channels, *size, dtype=dtype, last=last) for size in sizes]
        teacher = [self.tensor(images, self.channels, *size, dtype=dtype, last=last).detach() for size in sizes]
        return self.compare("instance_norm_mse", lambda f, *given: f(*given), (levels, teacher), dtype)

    def large(self) -> str:
        """More than 2^31 elements in a level: the loss of a batch is the mean of those of its halves."""
        images = 2**31 // (256 * 128 * 128) + 2
        levels = [torch.randn(images, 256, 128, 128, device=self.device, dtype=torch.bfloat16) for _ in range(2)]
        student, teacher = levels[0].requires_grad_(), levels[1]
        whole = ops.instance_norm_mse([student], [teacher])
        whole.backward()
        middle = images // 2
        halves = [
            ops.instance_norm_mse([student.detach()[part]], [teacher[part]])
            for part in (slice(middle), slice(middle, None))
        ]
        mean = (halves[0] * middle + halves[1] * (images - middle)) / images
        if not torch.allclose(whole.detach(), mean, rtol=1e-3) or not student.grad[-1].isfinite().all():
            raise AssertionError(f"loss {whole.item()}, its halves' mean {mean.item()}")
        return "ok"


def cases(found: Cases) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names and calls."""
    half, single = torch.bfloat16, torch.float32
    some = slice(0, 1) if found.toy else slice(None)
    counts = {half: (15, 7, 80, 165, 166, 170, 177, 178), single: (15, 7, 76, 77, 80, 88, 89, 170)}
    for dtype, numbers in counts.items():
        kind = str(dtype).removeprefix("torch.")
        for count in numbers[some]:
            for op in ("box_pool", "norm_relu_box_pool"):
                for last in (False, True):
                    order = "channels-last" if last else "contiguous"
                    name = f"{op} {kind} {order}, {count} objects"
                    yield name, lambda op=op, n=count, d=dtype, o=last: found.pool(op, n, d, o)
        for count in (7, 15, 16)[some]:
            yield f"box_paint_conv3x3 {kind}, {count} objects", lambda n=count, d=dtype: found.taps(n, d)
    sizes = [(1, 12256), (1, 12257), (96, 128), (1, 12289)] if not found.toy else [(4, 6)]
    for size in sizes:
        for dtype in (half, torch.float16, single):
            kind = str(dtype).removeprefix("torch.")
            name = f"instance_norm_mse {kind}, {size[0]} x {size[1]}"
            yield name, lambda s=size, d=dtype: found.norm([s], d)
    yield "17 levels", lambda: found.norm([(3, 2)] * 17, single)
    yield "a level without cells", lambda: found.norm([(4, 4), (0, 4)], single)
    yield "no box", lambda: found.pool("box_pool", 0, single, False)
    images = 2 if found.toy else 300  # 76,800 rows: more than 65,535
    yield f"{images} images", lambda: found.norm([(2, 2)], single, images=images)
    if found.device.type == "cuda" and not found.toy:
        yield "2^31 elements", found.large


def windows(context: Context) -> None:
    """The stage: one entry per call, "ok" or the error."""
    for name, call in cases(Cases(context.device, context.toy)):
        if context.left < 0:
            context.record("left out", f"{name} and what follows: no time")
            return
        context.attempt(name, call)
