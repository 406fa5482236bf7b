"""Builds csrc/*.cpp into the Python-independent library fastkd/_cpu.so, and csrc/*.cu into fastkd/_cuda.so.

Every source is compiled once per instruction set (FASTKD_CAPABILITY 0 generic, 1 AVX2, 2 AVX-512, 3 AVX512_BF16;
csrc/capability.h), chosen at run time: one library serves every x86-64 machine, every Python and every torch >= 2.10.

Environment: MAX_JOBS (parallel compilers; default: by cores and free memory); CXX and CXXFLAGS (read by setuptools);
FASTKD_CUDA: unset = build the GPU kernels where that is possible and say why where not, 0 = do not, 1 = fail where that
is not possible; CUDA_HOME (the toolkit); TORCH_CUDA_ARCH_LIST (default: sm_80, sm_90, sm_100 as far as nvcc knows them,
and PTX of the last). No GPU is needed to build for one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

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
NVCC_ARGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-DUSE_CUDA",  # the stable ABI's functions for CUDA streams
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Xcompiler",
    "-fvisibility=hidden",
]
LINK_ARGS = ["-Wl,--as-needed"] if sys.platform == "linux" else []
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


class NoCudaBuild(Exception):
    """Why the GPU kernels cannot be built, and what to do about it."""


def find_toolkit() -> Path:
    """The folder of the CUDA toolkit: CUDA_HOME, else that of the nvcc on PATH, else /usr/local/cuda.

    An nvcc on PATH may be a script that runs another one, so it is asked where it is.
    Raises: NoCudaBuild where there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        if not (Path(home) / "bin" / "nvcc").is_file():
            raise NoCudaBuild(f"CUDA_HOME={home} has no bin/nvcc; point it to a CUDA toolkit or unset it")
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", tried.stderr, re.MULTILINE)
        if top is None:
            raise NoCudaBuild(f"{nvcc} does not say where its toolkit is; set CUDA_HOME")
        return Path(top.group(1)).resolve()
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        return Path("/usr/local/cuda")
    raise NoCudaBuild("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")


def toolkit_version(home: Path) -> tuple[int, int]:
    """(major, minor) of a toolkit."""
    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise NoCudaBuild(f"{home}/bin/nvcc --version names no release, got {told.strip()!r}; set CUDA_HOME")
    return int(release.group(1)), int(release.group(2))


def check_toolkit() -> tuple[Path, tuple[int, int]]:
    """The toolkit that fits this torch and its version.

    Raises: NoCudaBuild where torch has no CUDA, there is no toolkit, or the two are of different major versions.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise NoCudaBuild(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    home = find_toolkit()
    version = toolkit_version(home)
    if version[0] != int(wanted.split(".")[0]):
        raise NoCudaBuild(
            f"torch {torch.__version__} is built for CUDA {wanted}, {home} holds CUDA {version[0]}.{version[1]}; "
            f"set CUDA_HOME to a toolkit {wanted.split('.')[0]}.x, or install a torch for CUDA {version[0]}"
        )
    return home, version


def architectures(version: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST for a toolkit: what it knows of sm_80, sm_90 and sm_100, with PTX for later cards."""
    known = ["8.0"] + (["9.0"] if version >= (11, 8) else []) + (["10.0"] if version >= (12, 8) else [])
    return ";".join(known) + "+PTX"


def prepare_cuda() -> Path | None:
    """The toolkit to build with, None to build without; FASTKD_CUDA decides (see above)."""
    request = os.environ.get("FASTKD_CUDA", "")
    if request not in ("", "0", "1"):
        sys.exit(f"FASTKD_CUDA must be 0 or 1, got {request!r}; unset it to build GPU kernels where that is possible")
    if request == "0":
        return None
    try:
        home, version = check_toolkit()
    except NoCudaBuild as reason:
        if request == "1":
            sys.exit(f"FASTKD_CUDA=1: {reason}")
        print(f"fastkd: no GPU kernels are built: {reason}. CUDA tensors will use plain torch.", file=sys.stderr)
        return None
    os.environ["CUDA_HOME"] = str(home)  # torch's own search would take the folder of a wrapper script
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(version))
    return home


CUDA_HOME = prepare_cuda()
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402  (reads CUDA_HOME when imported)


class BuildPerCapability(BuildExtension):
    """Compiles every source once per capability, through generated one-line sources."""

    def build_extensions(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(parallel_jobs()))
        for extension in self.extensions:
            if extension.name == "fastkd._cpu":
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


def paths(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def cpu_extension() -> CppExtension:
    return CppExtension(
        "fastkd._cpu",
        sources=paths("csrc/*.cpp"),
        depends=paths("csrc/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
        py_limited_api=True,
    )


def cuda_extension(home: Path) -> CppExtension:
    """Like CUDAExtension, but with the static runtime: the library needs a driver and torch, no toolkit."""
    return CppExtension(
        "fastkd._cuda",
        sources=paths("csrc/*.cu"),
        depends=paths("csrc/*.h"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
        extra_link_args=LINK_ARGS,
        py_limited_api=True,
    )


setup(
    ext_modules=[cpu_extension(), *([cuda_extension(CUDA_HOME)] if CUDA_HOME else [])],
    cmdclass={
        "build_ext": BuildPerCapability.with_options(no_python_abi_suffix=True),
        "bdist_wheel": PythonIndependentWheel,
    },
)
