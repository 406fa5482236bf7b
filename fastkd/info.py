"""Output of `fastkd info`: versions, build, CPU capability, GPUs, and the ops with compiled kernels."""

from __future__ import annotations

import importlib.metadata
import os
import pkgutil
import platform

import torch
from rich.console import Console
from rich.table import Table

import fastkd
from fastkd import ops
from fastkd.ops._support import library

PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "pillow", "pycocotools", "tyro", "rich", "tensorboard", "matplotlib",
    "safetensors", "onnx", "onnxscript", "onnxruntime",
)  # fmt: skip


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_library() -> tuple[str | None, str | None]:
    """Why the compiled CPU ops cannot run (None if they can), and the capability in use; never raises."""
    try:
        return library.why_not_loaded(), library.cpu_capability()
    except RuntimeError as error:  # FASTKD_CPU_CAPABILITY names a capability that this CPU lacks
        return str(error).splitlines()[0], None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = (bytes_ / 2**30 for bytes_ in torch.cuda.mem_get_info(index))
        found.append(f"{card.name}, sm_{card.major}{card.minor}, {free:.0f} of {total:.0f} GiB free")
    return found


def _why_no_gpu() -> str | None:
    """Why torch can use no GPU, in the words of torch (no driver, or one that is too old); None if it can."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch sees no GPU"


def _kernels(why_not: str | None) -> dict[str, dict[str, str]]:
    """The backend of every op (a module of fastkd.ops) on CPU and GPU.

    Args:
        why_not: why no compiled op runs on the CPU, or None.
    """
    table = {}
    for op in sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.ispkg):
        reasons = {"cpu": why_not or library.why_no_kernel(op), "cuda": library.why_no_kernel(op, "cuda")}
        table[op] = {device: f"plain torch: {reason}" if reason else "compiled" for device, reason in reasons.items()}
        if reasons["cuda"] is None and op in library.TRITON_OPS:
            missing = library.why_triton_cannot_compile()
            table[op]["cuda"] = f"fails: {missing}" if missing else "compiled by Triton when first called"
    return table


def _cards() -> list[str]:
    """Descriptions of the visible GPUs that the kernels are not built for."""
    build = library.cuda_build()
    if build is None:
        return []
    cards = range(torch.cuda.device_count())
    found = {library.why_unsupported(build, torch.cuda.get_device_capability(index)) for index in cards}
    return sorted(reason for reason in found if reason is not None)


def collect() -> dict:
    """Everything `fastkd info` prints, as JSON types.

    Returns: {"fastkd", "python", "platform": str; "packages": {name: version}; "cpu": {"model", "cores", "threads",
        "capability" (None where no compiled op runs), "library" (path), "build" (None if not built), "why_not"};
        "cuda": {"torch" (CUDA version torch was built for or None), "build" (None if not built), "why_not", "gpus" and
        "unsupported" (lists of str), "why_no_gpu" (None if there is one)}; "ops": {op: {"cpu", "cuda"}}}.
    """
    why_not, capability = _cpu_library()
    return {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": capability,
            "library": str(library.cpu_library()),
            "build": library.cpu_build(),
            "why_not": why_not,
        },
        "cuda": {
            "torch": torch.version.cuda,
            "build": library.cuda_build(),
            "why_not": library.why_no_cuda(),
            "gpus": _gpus(),
            "why_no_gpu": _why_no_gpu(),
            "unsupported": _cards(),
        },
        "ops": _kernels(why_not),
    }


def print_info(console: Console | None = None) -> None:
    """Prints `collect()` as tables."""
    console = console or Console()
    info = collect()
    cpu = info["cpu"]
    table = Table(title=f"fastkd {info['fastkd']}", show_header=False, title_justify="left")
    table.add_row("Python", f"{info['python']} on {info['platform']}")
    table.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads")
    table.add_row("CPU kernels", f"run {cpu['capability']}" if cpu["why_not"] is None else f"none: {cpu['why_not']}")
    table.add_row("built", f"{cpu['build']}\n{cpu['library']}" if cpu["build"] else "no")
    cuda = info["cuda"]
    built_for = f"torch is built for CUDA {cuda['torch']}" if cuda["torch"] else "torch is built without CUDA"
    table.add_row("GPU", "\n".join(cuda["gpus"]) or f"none usable; {built_for}; {cuda['why_no_gpu']}")
    reasons = [cuda["why_not"]] if cuda["why_not"] else cuda["unsupported"]
    table.add_row("GPU kernels", "\n".join([*([cuda["build"]] if cuda["build"] else []), *reasons]))
    console.print(table)
    packages = Table("package", "version")
    for package, version in info["packages"].items():
        packages.add_row(package, version)
    console.print(packages)
    kernels = Table("op", "CPU", "CUDA")
    for op, where in info["ops"].items():
        known = cuda["why_not"] and where["cuda"].endswith(cuda["why_not"])  # printed in full above
        kernels.add_row(op, where["cpu"], "plain torch: no GPU kernels" if known else where["cuda"])
    console.print(kernels)
