"""Builds csrc/*.cpp into the Python-independent library fastkd/_cpu.so.

Every source is compiled once per instruction set (FASTKD_CAPABILITY 0 generic, 1 AVX2, 2 AVX-512, 3 AVX512_BF16;
csrc/capability.h), chosen at run time: one library serves every x86-64 machine, every Python and every torch >= 2.10.

Environment: MAX_JOBS (parallel compilers; default: by cores and free memory), FASTKD_CUDA (see `check_cuda_request`),
CXX and CXXFLAGS (read by setuptools).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
CAPABILITIES = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}
COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # csrc/simd.h, multiply_add
    "-Wall",
    "-Wno-psabi",
    f"-fmacro-prefix-map={ROOT}/=",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
]
MEMORY_PER_JOB = 1.5 * 2**30


def available_memory() -> float:
    """Bytes that may be used without swapping, infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:  # a container may hold less than the machine has
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


def parallel_jobs() -> int:
    """Compilers to run at once: one a core, as far as the free memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(cores, available_memory() // MEMORY_PER_JOB)))


def check_cuda_request() -> None:
    """FASTKD_CUDA: unset or 0 builds without CUDA; 1 fails, as this version has no CUDA kernels to build."""
    request = os.environ.get("FASTKD_CUDA", "0")
    if request == "1":
        sys.exit("FASTKD_CUDA=1: this version of fastkd has no CUDA kernels; unset it, CUDA tensors use plain torch")
    if request != "0":
        sys.exit(f"FASTKD_CUDA must be 0 or 1, got {request!r}; unset it to build without CUDA")


class BuildPerCapability(BuildExtension):
    """Compiles every source once per capability, through generated one-line sources."""

    def build_extensions(self) -> None:
        check_cuda_request()
        os.environ.setdefault("MAX_JOBS", str(parallel_jobs()))
        for extension in self.extensions:
            extension.sources = self.per_capability(extension.sources)
        super().build_extensions()

    def per_capability(self, sources: list[str]) -> list[str]:
        folder = Path(self.build_temp).resolve() / "per_capability"
        folder.mkdir(parents=True, exist_ok=True)
        generated = []
        for source in map(Path, sources):
            has_bf16 = "#define FASTKD_BF16_KERNELS" in (ROOT / source).read_text()
            for name, number in CAPABILITIES.items():
                if name == "avx512_bf16" and not has_bf16:
                    continue
                target = folder / f"{source.stem}_{name}.cpp"
                text = f'#define FASTKD_CAPABILITY {number}\n#include "{(ROOT / source).as_posix()}"\n'
                if not target.exists() or target.read_text() != text:
                    target.write_text(text)
                generated.append(str(target))
        return generated


class PythonIndependentWheel(bdist_wheel):
    """The library has no PyInit and links no libpython: the wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py310", "none", super().get_tag()[2]


setup(
    ext_modules=[
        CppExtension(
            "fastkd._cpu",
            sources=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp")),
            depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.h")),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
            py_limited_api=True,
        )
    ],
    cmdclass={
        "build_ext": BuildPerCapability.with_options(no_python_abi_suffix=True),
        "bdist_wheel": PythonIndependentWheel,
    },
)
