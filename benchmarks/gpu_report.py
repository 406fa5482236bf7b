"""What the compiler made of the GPU kernels: `python -m benchmarks.gpu_report`, or `make gpu-report`. Needs no GPU.

Reads fastkd/_cuda.so back with cuobjdump (the one Triton ships): registers, shared memory, stack and spills of every
kernel and card, and whether it moves 16 bytes an instruction through global memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from fastkd.ops import _library

SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Args:
        name: without namespaces and parameters; with template arguments.
        card: "sm_90" and the like.
        registers: a thread.
        shared: static shared memory, bytes.
        stack: bytes of local memory a thread, arrays indexed at run time among them.
        spills: instructions that store registers to local memory for want of registers.
        wide: 16-byte global loads and stores.
        tensor_cores: matrix instructions.
    """

    name: str
    card: str
    registers: int
    shared: int
    stack: int
    spills: int
    wide: int
    tensor_cores: int


def cuobjdump() -> Path:
    """Triton's cuobjdump, else the one on PATH.

    Raises: FileNotFoundError where there is none.
    """
    try:
        import triton

        shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if shipped.is_file():
            return shipped
    except ImportError:
        pass
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("gpu_report: cuobjdump must be there, got none; `pip install triton` brings it")
    return Path(found)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def readable(symbol: str) -> str:
    """A kernel's symbol as its name and template arguments."""
    name = _run("c++filt", symbol).strip()
    name = re.sub(r"\(anonymous namespace\)::|fastkd::|c10::|torch::headeronly::", "", name.split("(fastkd")[0])
    name = re.sub(r"^void ", "", name)
    depth = 0
    for place, letter in enumerate(name):  # cut the parameters: the first bracket outside template arguments
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel of a library, for every card it holds code for."""
    tool, kernels = cuobjdump(), []
    usage: dict[tuple[str, str], tuple[int, int, int]] = {}
    card = symbol = ""
    for line in _run(tool, "-res-usage", library).splitlines():
        if found := re.match(r"\s*arch = (sm_\w+)", line):
            card = found.group(1)
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found.group(1)
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage[card, symbol] = tuple(int(number) for number in found.groups())
    counts: dict[tuple[str, str], list[int]] = {}
    for line in _run(tool, "-sass", library).splitlines():
        if found := re.match(r"\s*code for (sm_\w+)", line):
            card = found.group(1)
        elif found := re.match(r"\s*Function : (\S+)", line):
            symbol = found.group(1)
            counts[card, symbol] = [0, 0, 0]
        elif "/*0" in line and (card, symbol) in counts:
            record = counts[card, symbol]
            record[0] += bool(re.search(r"\bSTL\b", line))
            record[1] += bool(re.search(r"\b(LDG|STG)\.E\.128", line))
            record[2] += bool(re.search(r"\b(HMMA|HGMMA|DMMA|UTCHMMA|UTCQMMA|WGMMA)\b", line))
    names = {symbol: readable(symbol) for _, symbol in usage}
    for (card, symbol), (registers, stack, shared) in sorted(usage.items()):
        spills, wide, tensor_cores = counts.get((card, symbol), [0, 0, 0])
        kernels.append(Kernel(names[symbol], card, registers, shared, stack, spills, wide, tensor_cores))
    return kernels


def main() -> None:
    """Prints the table, one line a kernel and card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=_library.BUILT_IN_CUDA, help="the library to read")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    chosen = parser.parse_args()
    if not chosen.library.is_file():
        raise SystemExit(f"gpu_report: {chosen.library} does not exist; `FASTKD_CUDA=1 make build` says why")
    kernels = read_kernels(chosen.library)
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6} {'16-byte':>7}  kernel")
    for card in sorted({kernel.card for kernel in kernels}):
        print(f"{card}:")
        for kernel in kernels:
            if kernel.card == card:
                k = kernel
                print(f"{k.registers:>9} {k.shared:>7} {k.stack:>6} {k.spills:>6} {k.wide:>7}  {k.name}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
