"""Builds csrc/*/*.cpp into the Python-independent library fastkd/_cpu.so, and csrc/*/*.cu into fastkd/_cuda.so.

Every C++ source is compiled once per instruction set (FASTKD_CAPABILITY 0 generic, 1 AVX2, 2 AVX-512, 3 AVX512_BF16;
csrc/common/capability.h), chosen at run time: one library serves every x86-64 machine, Python and torch >= 2.10.

Environment: FASTKD_OBJECTS (folder that keeps the object files, so that a second build compiles what changed and CMake
can link them; default: setuptools' own, which pip deletes); MAX_JOBS (parallel compilers; default: by cores and free
memory); CXX and CXXFLAGS (read by setuptools); FASTKD_CUDA: unset = build the GPU kernels where that is possible and
say why where not, 0 = do not, 1 = fail where that is not possible; CUDA_HOME (the toolkit); TORCH_CUDA_ARCH_LIST
(cards, as "8.0;9.0+PTX"; default: machine code for 8.0, 9.0 and 10.0, and PTX for every other card from 8.0 on). No
GPU is needed to build for one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch
except ModuleNotFoundError:  # with build isolation pip installs it for the build
    sys.exit(
        "fastkd: torch must be installed to build without isolation, got none; run pip install 'torch>=2.10' numpy "
        "ninja first, or leave out --no-build-isolation"
    )
from torch.utils import cpp_extension
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
    "-ffp-contract=off",  # csrc/common/simd.h, multiply_add
    "-Wall",
    "-Wno-psabi",
    f"-fmacro-prefix-map={ROOT}/=",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
]
NVCC_ARGS = [
    "-O1",  # of the host's side, which only launches; device code is always compiled with all optimisations
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fvisibility=hidden",
    "-DUSE_CUDA",  # the stable ABI's functions for CUDA streams
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
CARDS = ("80", "90", "100")  # A100; H100; B200. Later ones of the same major version run their machine code.
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
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
            raise NoCudaBuild(f"{nvcc} does not say where its toolkit is; set CUDA_HOME to the toolkit's folder")
        return Path(top.group(1)).resolve()
    if (DEFAULT_TOOLKIT / "bin" / "nvcc").is_file():
        return DEFAULT_TOOLKIT
    raise NoCudaBuild("no nvcc was found; install the CUDA toolkit, or set CUDA_HOME to its folder")


def ask_nvcc(home: Path, question: str) -> str:
    command = [home / "bin" / "nvcc", question]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def find_runtime(home: Path) -> Path:
    """The folder of a toolkit's static runtime.

    Raises: NoCudaBuild where it or the headers are missing, as in installations of the compiler alone.
    """
    folders = [folder for folder in (home / "lib64", home / "lib") if (folder / "libcudart_static.a").is_file()]
    if not folders or not (home / "include" / "cuda_runtime.h").is_file():
        raise NoCudaBuild(
            f"{home} lacks include/cuda_runtime.h or libcudart_static.a; install the toolkit's runtime with its headers"
        )
    return folders[0]


def check_toolkit() -> Path:
    """The toolkit that fits this torch.

    Raises: NoCudaBuild where torch has no CUDA, there is no toolkit, or the two are of different major versions.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise NoCudaBuild(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    home = find_toolkit()
    told = ask_nvcc(home, "--version")
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise NoCudaBuild(f"{home}/bin/nvcc --version names no release, got {told.strip()!r}; set CUDA_HOME")
    major = wanted.split(".")[0]
    if release.group(1) != major:
        raise NoCudaBuild(
            f"torch {torch.__version__} is built for CUDA {wanted}, {home} holds CUDA {'.'.join(release.groups())}; "
            f"set CUDA_HOME to a toolkit {major}.x, or install a torch for CUDA {release.group(1)}"
        )
    find_runtime(home)
    return home


def targets(home: Path) -> list[tuple[str, str]]:
    """What nvcc makes, as pairs (PTX version, code): ("80", "sm_90") is machine code of 9.0 made from PTX of 8.0.

    By default all comes from one PTX, which goes into the library too: the front end, half of the work, runs once, and
    nothing in the kernels asks for more than 8.0.
    Raises: NoCudaBuild if TORCH_CUDA_ARCH_LIST names no cards, or some that this nvcc does not know.
    """
    known = re.findall(r"\bsm_(\d+)\b", ask_nvcc(home, "--list-gpu-code"))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    if not wanted:
        return [("80", f"sm_{card}") for card in CARDS if card in known] + [("80", "compute_80")]
    pairs = []
    for card in wanted:
        number = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", card)
        if number is None:
            raise NoCudaBuild(f'TORCH_CUDA_ARCH_LIST must be versions such as "8.0;9.0+PTX", got {card!r}; correct it')
        name = number.group(1) + number.group(2)
        if name not in known:
            raise NoCudaBuild(
                f"TORCH_CUDA_ARCH_LIST names {card}, {home}/bin/nvcc knows {' '.join(known)}; "
                "take cards of these or set CUDA_HOME to another toolkit"
            )
        pairs += [(name, f"sm_{name}")] + ([(name, f"compute_{name}")] if number.group(3) else [])
    return pairs


def prepare_cuda() -> tuple[Path, list[tuple[str, str]]] | None:
    """The toolkit and targets to build with, None to build without; FASTKD_CUDA decides (see above)."""
    request = os.environ.get("FASTKD_CUDA", "")
    if request not in ("", "0", "1"):
        sys.exit(f"FASTKD_CUDA must be 0 or 1, got {request!r}; unset it to build GPU kernels where that is possible")
    if request == "0":
        return None
    try:
        home = check_toolkit()
        return home, targets(home)
    except NoCudaBuild as reason:
        if request == "1":
            sys.exit(f"FASTKD_CUDA=1: {reason}")
        print(f"fastkd: no GPU kernels are built: {reason}. CUDA tensors will take plain torch.", file=sys.stderr)
        return None


class Build(BuildExtension):
    """Compiles every C++ source once per capability, through generated one-line sources, and the GPU kernels."""

    user_options = [*BuildExtension.user_options, ("only-cuda", None, "build fastkd/_cuda.so alone")]  # noqa: RUF012
    boolean_options = [*BuildExtension.boolean_options, "only-cuda"]  # noqa: RUF012

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only_cuda = False

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = os.environ.get("FASTKD_OBJECTS") or self.build_temp

    def build_extensions(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(parallel_jobs()))
        cpu, cuda = self.extensions
        self.extensions = [] if self.only_cuda else [cpu]
        cpu.sources = self.per_capability(cpu.sources)
        found = prepare_cuda()
        if found is not None:
            self.extensions.append(complete(cuda, *found))
        try:
            super().build_extensions()
        except Exception:
            if found is not None:
                print("fastkd: FASTKD_CUDA=0 builds without the GPU kernels", file=sys.stderr)
            raise

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
    """The libraries have no PyInit and link no libpython: the wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py310", "none", super().get_tag()[2]


def extension(name: str, pattern: str) -> CppExtension:
    def paths(pattern: str) -> list[str]:
        found = (path.relative_to(ROOT) for path in ROOT.glob(pattern))
        return sorted(path.as_posix() for path in found if path.parts[1] != "simt")  # the emulation, for tests

    return CppExtension(
        name,
        sources=paths(pattern),
        depends=paths("csrc/*/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
        extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def complete(cuda: CppExtension, home: Path, pairs: list[tuple[str, str]]) -> CppExtension:
    """The extension of the GPU kernels with what a toolkit adds.

    Not a CUDAExtension: that links the shared runtime, while this needs a driver and torch but no toolkit to run.
    """
    cpp_extension.CUDA_HOME = str(home)  # its own search takes the folder of a wrapper script
    flags = [f"-gencode=arch=compute_{ptx},code={code}" for ptx, code in pairs]
    flags.append(f"-DFASTKD_CUDA_TARGETS={'.'.join(code for _, code in pairs)}")
    cuda.extra_compile_args["nvcc"] = [*NVCC_ARGS, *flags]
    cuda.include_dirs.append(str(home / "include"))
    cuda.library_dirs.append(str(find_runtime(home)))
    cuda.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return cuda


setup(
    ext_modules=[extension("fastkd._cpu", "csrc/*/*.cpp"), extension("fastkd._cuda", "csrc/*/*.cu")],
    cmdclass={
        "build_ext": Build.with_options(no_python_abi_suffix=True),
        "bdist_wheel": PythonIndependentWheel,
    },
)
