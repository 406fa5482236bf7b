"""The Triton kernels as compiled for sm_80, sm_90 and sm_100, without a GPU: `python -m benchmarks.gpu.triton_report`.

Registers, spilled bytes, shared memory, tensor-core instructions and the widest global access are read from the
binaries with Triton's cuobjdump. Nothing is run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from fastkd.ops.triton import attention_backward, attention_forward, attention_mass
from fastkd.ops.triton.configurations import FEW, Card
from fastkd.ops.triton.plan import Launch

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of the A100, H100 and B200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program
RESERVED_SHARED = {80: 0, 90: 1024, 100: 1024}  # bytes of it reserved by the system
SIZES = ((100, 152), (50, 76), (25, 38), (13, 19), (7, 10))  # strides 8..128 of 800 x 1216


@dataclass(frozen=True)
class Case:
    """A call whose kernel is compiled.

    Args:
        kernel: "forward", "merge", "backward", "backward merge" or "mass" of the attention.
        projected: keys are key_weight times the cells.
        last: the pyramids are channels-last.
        dtype: of the pyramids.
        count: queries per image.
        precision: torch's setting for float32 products, "ieee" or "tf32".
    """

    kernel: str
    projected: bool = False
    last: bool = True
    dtype: torch.dtype = torch.bfloat16
    count: int = 42
    precision: str = "ieee"

    def __str__(self) -> str:
        form = "projected" if self.projected else "absorbed"
        order = "channels-last" if self.last else "contiguous"
        dtype = str(self.dtype).removeprefix("torch.")
        precision = f" {self.precision}" if self.dtype == torch.float32 else ""
        return f"{self.kernel} {form} {order} {dtype}{precision} N={self.count}"


@dataclass(frozen=True)
class Row:
    """Resources of a compiled kernel.

    Args:
        spilled: bytes of a thread's stack, which contains only spilled registers.
        shared: bytes of shared memory per program, including the reserved part.
        tensor_core: instructions by name.
        access: bits of the widest global read.
    """

    case: Case
    card: int
    registers: int
    spilled: int
    shared: int
    tensor_core: dict[str, int]
    access: int


def _table() -> list[Case]:
    """Every configuration of fastkd/ops/triton/configurations.py at the published channels and heads."""
    counts = (32, 42)  # absorbed keys for few queries, projected keys for more
    types = [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.float64, "ieee")]
    cases = [
        Case(kernel, projected, last, dtype, count, precision)
        for dtype, precision in types
        for kernel in ("forward", "backward", "mass")
        for projected in (False, True)
        for last in (True, False)
        for count in counts
        if projected == (count > FEW)
    ]
    return [*cases, Case("merge"), Case("backward merge", projected=True)]


TABLE = _table()


def _arguments(case: Case, channels: int = 256, heads: int = 8, images: int = 2) -> list:
    """Arguments of the op at the published shape, without memory."""
    depth, order = channels // heads, torch.channels_last if case.last else torch.contiguous_format
    wide = torch.promote_types(case.dtype, torch.float32)

    def small(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device="meta")

    def pyramid() -> list[Tensor]:
        shapes = [(images, channels, *size) for size in SIZES]
        return [torch.empty(shape, dtype=case.dtype, device="meta", memory_format=order) for shape in shapes]

    queries = small(images, heads, case.count, depth if case.projected else channels)
    weight = small(heads * depth, channels) if case.projected else None
    tables = ([small(images, heads, case.count, size[axis]) for size in SIZES] for axis in (0, 1))
    return [queries, pyramid(), weight, *tables, pyramid()]


def launch_of(case: Case, card: int) -> Launch:
    """The launch for a card."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = case.precision
    try:
        return _launch(case, _arguments(case), Card(min(card // 10, 10), PROCESSORS[card]))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _launch(case: Case, arguments: list, card: Card) -> Launch:
    launches, output, logsumexp, normal = attention_forward.plan_forward(*arguments, card=card)
    if case.kernel in ("forward", "merge"):
        return launches[case.kernel == "merge"]
    if case.kernel.startswith("backward"):
        launches, _ = attention_backward.plan_backward(output, output, normal, *arguments, True, True, card)
        return launches[case.kernel == "backward merge"]
    chosen = torch.empty(output.shape[0], case.count, dtype=torch.bool, device="meta")
    return attention_mass.plan_mass(*arguments[:5], chosen, logsumexp, 1.0, card)[0][-1]


def _source(launch: Launch) -> ASTSource:
    """The kernel with the types of a launch's arguments; pointers are 16-byte aligned, as torch allocates."""

    def type_of(value):
        return tuple(map(type_of, value)) if isinstance(value, tuple) else mangle_type(value)

    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        pointers = [(index, place) for place in range(len(value))] if isinstance(value, tuple) else [(index,)]
        if isinstance(value[0] if isinstance(value, tuple) else value, Tensor):
            aligned |= {pointer: [["tt.divisibility", 16]] for pointer in pointers}
    return ASTSource(launch.kernel, signature, constants, aligned)


def _cuobjdump(flag: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_kernel(case: Case, card: int) -> Row:
    """Compiles the kernel of a case for a card and reads the binary."""
    launch = launch_of(case, card)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", card, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return Row(
        case,
        card,
        registers,
        stack + local,
        compiled.metadata.shared + RESERVED_SHARED[card],
        dict(Counter(name.split(".")[0] for name in names if "MMA" in name.split(".")[0])),
        max(int((re.search(r"\.(64|128)\b", name) or [0, 32])[1]) for name in names if name.startswith("LDG")),
    )


def read_kernels(cases: list[Case] | None = None, cards: tuple[int, ...] = (80, 90, 100)) -> list[Row]:
    """One row per case and card; about two seconds each."""
    return [read_kernel(case, card) for case in (TABLE if cases is None else cases) for card in cards]


HEADS = (
    "| kernel | card | registers | spilled bytes | shared KiB | tensor-core instructions | widest read, bits |",
    "|---|---|---|---|---|---|---|",
)


def line_of(row: Row) -> str:
    used = " ".join(f"{count} {name}" for name, count in row.tensor_core.items()) or "none"
    numbers = f"{row.registers} | {row.spilled} | {row.shared / 1024:.1f}"
    return f"| {row.case} | sm_{row.card} | {numbers} | {used} | {row.access} |"


def table(rows: list[Row]) -> list[str]:
    return [*HEADS, *map(line_of, rows)]


def main() -> None:
    print("\n".join(HEADS))
    for case in TABLE:
        for row in read_kernels([case]):
            print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
