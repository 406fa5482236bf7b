"""One stage of benchmarks/gpu/check.py: `python -m benchmarks.gpu.stages NAME --device cuda`."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.gpu.stages import Context, failures

# name: (module, function), imported when the stage runs, so that an import error affects only this stage
STAGES = {
    "versions": ("host", "versions"),
    "build": ("host", "build"),
    "windows": ("windows", "windows"),
    "tests": ("host", "tests"),
    "sanitizer": ("host", "sanitizer"),
    "ops": ("ops", "ops"),
    "parts": ("steps", "parts"),
    "steps": ("steps", "steps"),
    "scenes": ("scenes", "scenes"),
}


def main(arguments: list[str] | None = None) -> int:
    """1 if any entry is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(STAGES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true")
    chosen = parser.parse_args(arguments)
    module, function = STAGES[chosen.name]
    context = Context.from_environment(chosen.device, chosen.toy)
    getattr(importlib.import_module(f"benchmarks.gpu.stages.{module}"), function)(context)
    return int(bool(failures(context.found)))


if __name__ == "__main__":
    sys.exit(main())
