"""Resources of the compiled GPU kernels: `python -m benchmarks.gpu.report`, or `make gpu-report`. Needs no GPU.

Reads fastkd/_cuda.so with cuobjdump (Triton's, else the toolkit's): registers, shared memory, stack and spills of every
kernel and card, 16-byte global accesses and matrix instructions. If benchmarks/gpu/triton_report.py is present, the
Triton kernels follow, compiled for the same cards.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastkd.files import write_json
from fastkd.ops._support import library

# Maximum shared memory of a block in bytes: CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
Place = tuple[str, str]  # card, symbol


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Args:
        source: stem of the .cu file; empty for a kernel outside an anonymous namespace.
        name: with template arguments, without namespaces and parameters.
        card: "sm_90" and the like.
        registers: per thread.
        shared: bytes per block, without dynamic shared memory.
        stack: bytes of local memory per thread: spilled registers and dynamically indexed arrays.
        spills: stores to local memory; None if the instructions were not read.
        wide: 16-byte global loads and stores, likewise.
        tensor_cores: matrix instructions, likewise.
    """

    source: str
    name: str
    card: str
    registers: int
    shared: int
    stack: int
    spills: int | None
    wide: int | None
    tensor_cores: int | None


def cuobjdump() -> Path:
    """Triton's cuobjdump, else the one on PATH.

    Raises: FileNotFoundError if there is none.
    """
    found = importlib.util.find_spec("triton")
    if found is not None and found.submodule_search_locations:
        shipped = Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if shipped.is_file():
            return shipped
    path = shutil.which("cuobjdump")
    if path is None:
        raise FileNotFoundError("gpu_report: cuobjdump must be there, got none; `pip install triton` brings it")
    return Path(path)


def run(*command: object, given: str | None = None) -> str:
    parts = [str(part) for part in command]
    return subprocess.run(parts, check=True, capture_output=True, text=True, input=given).stdout


def parse_usage(text: str) -> dict[Place, tuple[int, int, int]]:
    """Registers, stack and shared memory from `cuobjdump -res-usage`."""
    usage: dict[Place, tuple[int, int, int]] = {}
    card = symbol = ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (sm_\w+)", line):
            card = found.group(1)
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found.group(1)
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            usage[card, symbol] = registers, stack, shared
    return usage


_CODE = {  # pattern to count, and a substring of such lines as a fast filter (there are millions of lines)
    "spills": ("STL", re.compile(r"^\s*/\*[0-9a-f]+\*/.*\bSTL\b")),
    "wide": (".128", re.compile(r"^\s*/\*[0-9a-f]+\*/.*\b(LDG|STG|LDGSTS)\.\S*128")),
    "tensor_cores": ("MMA", re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@\S+\s+)?(HMMA|IMMA|DMMA|HGMMA|UTC\w*MMA)\b")),
}


def parse_code(lines: Iterable[str]) -> dict[Place, dict[str, int]]:
    """Counts of instructions from the lines of `cuobjdump -sass`."""
    counts: dict[Place, dict[str, int]] = {}
    card, record = "", dict.fromkeys(_CODE, 0)
    for line in lines:
        if "\tcode for " in line:
            card = line.split()[-1]
        elif "Function : " in line:
            record = counts[card, line.split()[-1]] = dict.fromkeys(_CODE, 0)
        else:
            for name, (letters, pattern) in _CODE.items():
                if letters in line and pattern.match(line):
                    record[name] += 1
    return counts


def readable(symbols: list[str]) -> list[tuple[str, str]]:
    """Symbols of kernels as (stem of the source, name with template arguments)."""
    found = []
    for symbol, name in zip(symbols, run("c++filt", given="\n".join(symbols)).splitlines(), strict=True):
        source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", symbol)
        name = re.sub(r"\(anonymous namespace\)::|fastkd::|c10::|torch::headeronly::|^void ", "", name)
        depth, end = 0, len(name)
        for place, letter in enumerate(name):  # the parameters begin at the first bracket outside template arguments
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = place
                break
        found.append((source.group(1) if source else "", name[:end]))
    return found


def read_kernels(library: Path, cards: Iterable[str] | None = None) -> list[Kernel]:
    """Every kernel of a library for every card it has machine code for.

    Args:
        library: fastkd/_cuda.so.
        cards: whose instructions are read (seconds per card); None for all.
    """
    tool = cuobjdump()
    usage = parse_usage(run(tool, "-res-usage", library))
    there = sorted({card for card, _ in usage}, key=lambda card: int(re.sub(r"\D", "", card)))
    counts: dict[Place, dict[str, int]] = {}
    for card in there if cards is None else [card for card in cards if card in there]:
        counts |= parse_code(run(tool, "-sass", "-arch", card, library).splitlines())
    symbols = sorted({symbol for _, symbol in usage})
    names = dict(zip(symbols, readable(symbols), strict=True))
    kernels = []
    for (card, symbol), (registers, stack, shared) in usage.items():
        counted = counts.get((card, symbol), dict.fromkeys(_CODE))
        kernels.append(Kernel(*names[symbol], card, registers, shared, stack, **counted))
    return sorted(kernels, key=lambda kernel: (there.index(kernel.card), kernel.source, kernel.name))


def table(kernels: list[Kernel]) -> str:
    """One line per kernel, grouped by card."""
    heads = ("registers", "shared", "stack", "spills", "16-byte", "tensor cores")
    lines = [" ".join(heads) + "  kernel"]
    for card in dict.fromkeys(kernel.card for kernel in kernels):
        lines.append(f"{card} (a block may have {SHARED_LIMITS.get(card, 0) // 1024} KiB of shared memory)")
        for kernel in kernels:
            if kernel.card == card:
                k = kernel
                numbers = (k.registers, k.shared, k.stack, k.spills, k.wide, k.tensor_cores)
                cells = ("-" if number is None else str(number) for number in numbers)
                row = " ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
                lines.append(f"{row}  {k.source or '-'}: {k.name}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=library.BUILT_IN_CUDA, help="to read (default: the built one)")
    parser.add_argument("--cards", nargs="+", metavar="CARD", help="read these cards' instructions (default: all)")
    parser.add_argument("--json", type=Path, help="write the table of fastkd/_cuda.so to this file as well")
    parser.add_argument("--no-triton", action="store_true", help="leave Triton's kernels out (minutes)")
    chosen = parser.parse_args(arguments)
    if not chosen.library.is_file():
        raise SystemExit(f"gpu_report: {chosen.library} does not exist; `make cuda` builds it or says what is missing")
    kernels = read_kernels(chosen.library, chosen.cards)
    print(table(kernels), flush=True)
    if chosen.json:
        write_json(chosen.json, [asdict(kernel) for kernel in kernels])
    if not chosen.no_triton and importlib.util.find_spec("benchmarks.gpu.triton_report") is not None:
        from benchmarks.gpu import triton_report

        triton_report.main()


if __name__ == "__main__":
    main()
