# Everything needed is set up in .venv by the first target that needs it; only python3 (with venv), a C++ compiler and
# make have to be there. Every step leaves a stamp, so that a second `make` does only what changed.
#   make demo     train, distil, evaluate and report on generated scenes (a quarter of an hour)
#   make test     build, the CMake build with the emulation of CUDA, the tests, with other random cases in every run
#   make test-long    before a release: the GPU code too where nvcc is, all tests with every parameter set, many random
#                 cases (pytest --long)
#   make study    the evidence: seeds x methods (hours, resumable)
#   make bench    the ops against plain torch, into docs/results/ops.md (ten minutes; leave the machine alone meanwhile)
#   make bench-step   whole training steps against plain torch, into docs/results/step.md (35 minutes; likewise)
#   make check    `make lint` and the tests that compile, train and start nothing: for every edit
#   make lint     ruff's rules and format, mypy
#   make build    the virtual environment with the compiled package;   make clean
#   make test-install   isolated `pip install` of the source distribution into a fresh environment (downloads)
#   make sanitize       the ops under the address and undefined-behaviour sanitizers, the emulation of CUDA under the first
#   make portable       the C++ kernels by clang and for aarch64 (PORTABLE_CXX), where those compilers are
#   make cuda           csrc/*/*.cu into fastkd/_cuda.so, for the cards of TORCH_CUDA_ARCH_LIST or 8.0, 9.0, 10.0 and PTX;
#                       needs nvcc, no GPU;   make gpu-report   what the compiler made of them;   make roofline   PREDICTED times
#   make docs           the documentation site, built strictly, into build/site; needs no compiler and no torch
#   make wheel          dist/fastkd-*.whl with CPU and GPU kernels, and a check of it
#   make test-gpu, bench-gpu, sanitize-gpu   on a GPU: the tests marked gpu, the benchmark, compute-sanitizer
#   make gpu-check      eight minutes on a GPU: build, tests and measurements into OUT; needs no network; with VENV=none
#                       it takes the interpreter at hand; DEVICE=cpu rehearses it at toy sizes
#   make any-machine    the wheel under other Pythons and torches, the ops as on older CPUs (downloads)
#   make faults         a thousand kills, full disks, damaged files; make hostile   mutated files for every reader (hours)
#   make stack          an older torch and its Triton (STACK), in an environment of its own (downloads)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
SOURCES := $(filter-out csrc/simt/%,$(wildcard csrc/*/*.cpp csrc/*/*.h))
CUDA_SOURCES := $(filter-out csrc/simt/%,$(wildcard csrc/*/*.cu csrc/*/*.h))
EMULATED := $(wildcard csrc/*/*.cu csrc/simt/*)
OBJECTS := $(CURDIR)/build/objects
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The emulation of CUDA for tests is a Python module: it is built where Python's headers are.
SIMT = -DFASTKD_SIMT=$(shell $(BIN)/python -c "import os, sysconfig; print('ON' if os.path.exists(os.path.join(\
    sysconfig.get_path('include'), 'Python.h')) else 'OFF')")
CMAKE = $(shell command -v cmake 2>/dev/null || echo $(BIN)/cmake)

.DELETE_ON_ERROR:
.PHONY: portable demo test study bench bench-step build cmake lint check docs test-install sanitize sanitize-simt clean

build: $(STAMPS)/built

$(STAMPS)/created:
	$(PYTHON) -c "import sys, venv; sys.exit(sys.version_info < (3, 10) and 'fastkd needs Python 3.10: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# --no-compile: Python compiles the few thousand files that are imported when it first does so, not all 12,000. It keeps
# them even where the environment asks it not to: else every process of the tests compiles torch anew, for eight seconds.
unexport PYTHONDONTWRITEBYTECODE
$(STAMPS)/dependencies: pyproject.toml | $(STAMPS)/created
	$(PIP) install --upgrade pip
	$(BIN)/python -c "import tomllib" 2>/dev/null || $(PIP) install tomli
	$(BIN)/python .ci/requirements.py test onnx timm lint hosts > $(STAMPS)/requirements.txt
	$(PIP) install --no-compile -r $(STAMPS)/requirements.txt
	touch $@

$(STAMPS)/built: $(STAMPS)/dependencies setup.py $(SOURCES)
	FASTKD_OBJECTS=$(OBJECTS) FASTKD_CUDA=0 $(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

cmake: $(STAMPS)/cmake

# The CPU library is linked of what `build` compiled; `make sanitize` compiles it by CMake, as users from C++ do.
$(STAMPS)/cmake: $(STAMPS)/built CMakeLists.txt $(EMULATED)
	$(CMAKE) -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python $(SIMT) \
	-DFASTKD_OBJECTS_FROM=$(OBJECTS)
	$(CMAKE) --build build/cmake --parallel 2
	touch $@

.PHONY: cuda gpu-report roofline wheel gpu test-gpu bench-gpu sanitize-gpu

# Asked for by name it fails where it cannot be built; for `make test-long` setup.py then says why, and tests skip.
cuda: export FASTKD_CUDA := 1
cuda: $(STAMPS)/cuda

$(STAMPS)/cuda: $(STAMPS)/built $(CUDA_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace --only-cuda
	test ! -e fastkd/_cuda.so || touch $@

# The GPU code takes nvcc six minutes of one core: `make test` keeps it up to date only after a `make cuda`.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 50 --durations-min 2
.PHONY: test-long
test: build cmake $(wildcard $(STAMPS)/cuda)
	$(PYTEST)

test-long: build cmake $(STAMPS)/cuda
	$(PYTEST) --long

gpu-report: cuda
	$(BIN)/python -m benchmarks.gpu.report --json build/gpu_report.json

roofline: $(STAMPS)/dependencies
	$(BIN)/python -m benchmarks.gpu.predictions

wheel: build
	rm -rf dist
	FASTKD_CUDA=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m benchmarks.wheel dist/fastkd-*.whl

# These end with one line where there is no GPU. The sanitizers slow a kernel down a hundredfold: few calls of each op,
# and memory that the tests do not fill, as initcheck could not see it read before it is written.
gpu: $(STAMPS)/dependencies
	@$(BIN)/python -m benchmarks.gpu.card --card
	@$(MAKE) --no-print-directory cuda
	@$(BIN)/python -m benchmarks.gpu.card

test-gpu: gpu
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu

bench-gpu: gpu
	$(BIN)/python -m benchmarks.ops --device cuda --out build/bench-gpu

sanitize-gpu: gpu
	@tool=$$($(BIN)/python -m benchmarks.gpu.card --sanitizer) || exit 1; \
	for check in memcheck racecheck initcheck synccheck; do \
		echo "compute-sanitizer --tool $$check"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 FASTKD_GPU_CALLS=5 FASTKD_POISON=0 \
		"$$tool" --tool $$check --target-processes all --error-exitcode 1 \
		$(BIN)/python -m pytest -q -x -m gpu tests/ops/test_gpu.py -k plain || exit 1; \
	done

# The libraries are built by a stage of it, for the card that is there, or by make for the rehearsal.
OUT ?= build/gpu-check
DEVICE ?= cuda
.PHONY: gpu-check
gpu-check: $(if $(filter none,$(VENV)),,build)
	$(if $(filter none,$(VENV)),$(PYTHON),$(BIN)/python) -m benchmarks.gpu.check --device $(DEVICE) --out $(OUT)

# An older torch and its Triton, in an environment of its own: the CPU library is built anew, the tests of ops pass, and
# the Triton kernels are compiled and read back. Triton 3.6's interpreter fails with NumPy 2.4 and newer.
STACK ?= torch==2.11.0 torchvision==0.26.0 'numpy<2.4'
.PHONY: stack
stack: $(STAMPS)/dependencies
	rm -rf build/stack && mkdir -p build/stack
	git archive HEAD | tar -x -C build/stack
	$(PYTHON) -m venv build/stack/venv
	build/stack/venv/bin/python -m pip install --quiet $(STACK) -r $(STAMPS)/requirements.txt
	cd build/stack && FASTKD_CUDA=0 venv/bin/python setup.py --quiet build_ext --inplace
	cd build/stack && OMP_NUM_THREADS=1 venv/bin/python -m pytest -q --long tests/ops \
	--ignore-glob="tests/ops/*_cuda.py" --ignore-glob="tests/ops/test_simt*" --ignore=tests/ops/test_launch_checks.py \
	--ignore=tests/ops/test_planted_bugs.py
	cd build/stack && venv/bin/python -m benchmarks.gpu.triton_report

# The wheel in fresh environments (PYTHON=TORCH, the newest torch where none is named), the op tests with the
# instructions of older CPUs, and pip without torch: docs/results/any-machine.md.
ENVIRONMENTS ?= python3.10=2.10.0 python3.13
.PHONY: any-machine
any-machine: build
	$(BIN)/python -m benchmarks.any_machine --environments $(ENVIRONMENTS)

# Resumable: what is missing in docs/results/faults.json and hostile.json.
.PHONY: faults hostile
faults hostile: build
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$@

demo: build
	$(BIN)/fastkd demo

study: build
	$(BIN)/python -m benchmarks.study

bench: build
	$(BIN)/python -m benchmarks.ops

bench-step: build
	$(BIN)/python -m benchmarks.step

lint: $(STAMPS)/dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMPS)/docs
	$(BIN)/mkdocs build --strict --quiet

$(STAMPS)/docs: pyproject.toml | $(STAMPS)/created
	$(BIN)/python -c "import tomllib" 2>/dev/null || $(PIP) install tomli
	$(BIN)/python .ci/requirements.py --only docs > $(STAMPS)/docs.txt
	$(PIP) install -r $(STAMPS)/docs.txt
	touch $@

# Left out: what compiles, traces or trains, starts a process, or runs the slow random cases.
CHECKED := $(wildcard tests/test_*.py) tests/evaluation tests/distillers/test_cwd.py tests/distillers/test_fgfi.py \
	tests/distillers/test_icd.py tests/distillers/test_icd_options.py tests/distillers/test_lgd.py \
	tests/distillers/test_pkd.py tests/distillers/test_score_l2.py tests/ops/test_ops_reference.py tests/ops/test_every_op.py
check: lint build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal $(CHECKED) \
	-k "not compile and not opcheck and not fuzz and not processes and not threads and not corrupted"

# pip builds in an environment of its own and installs into a fresh one, which must then run the compiled op.
INSTALL := build/install
test-install: $(STAMPS)/dependencies
	rm -rf $(INSTALL) && mkdir -p $(INSTALL)
	$(BIN)/python setup.py --quiet sdist --dist-dir $(INSTALL)
	$(PYTHON) -m venv $(INSTALL)/venv
	$(INSTALL)/venv/bin/python -m pip install --quiet $(INSTALL)/fastkd-*.tar.gz
	cd $(INSTALL) && venv/bin/fastkd info
	cd $(INSTALL) && venv/bin/python -I -c "import sys, fastkd.ops._support.library as l; sys.exit(l.why_not_loaded())"
	rm -rf $(INSTALL)

# The tests of every op, picked up by name: fastkd/ops/<op>.py has tests/ops/test_<op>.py, or shares one of two files. What compiles or traces runs no
# kernel that the other tests do not run. Then the bugs planted in tests/planted, which must all be found.
OP_TESTS = $(wildcard $(patsubst fastkd/ops/%.py,tests/ops/test_%.py,$(wildcard fastkd/ops/*.py))) tests/ops/test_pool_paint.py tests/ops/test_attention.py
SANITIZERS := address,undefined,float-cast-overflow
sanitize: build
	$(CMAKE) -S . -B build/sanitize -DFASTKD_SANITIZE=$(SANITIZERS) -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(CMAKE) --build build/sanitize --parallel 2 --target fastkd_cpu planted
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 FASTKD_CPU_LIBRARY=$(CURDIR)/build/sanitize/_cpu.so \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --long --numprocesses 2 --dist worksteal $(OP_TESTS) tests/ops/test_ops_reference.py \
	-k "not compile and not opcheck and not export"
	FASTKD_PLANTED=$(CURDIR)/build/sanitize $(BIN)/python -m pytest -q tests/ops/test_planted_bugs.py
	$(MAKE) --no-print-directory sanitize-simt

# The emulation of CUDA under AddressSanitizer: all tests of the .cu sources and the bugs planted in csrc/simt/planted.cu.
sanitize-simt: build
	$(CMAKE) -S . -B build/sanitize-simt -DCMAKE_BUILD_TYPE=Release -DFASTKD_SIMT=ON -DFASTKD_SANITIZE=address \
	-DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(CMAKE) --build build/sanitize-simt --parallel 2 --target fastkd_simt
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 FASTKD_SIMT=$(CURDIR)/build/sanitize-simt/_simt.so \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --long --numprocesses 2 --dist worksteal $(wildcard tests/ops/test_*_cuda.py) \
	tests/ops/test_simt.py tests/ops/test_simt_sanitized.py tests/ops/test_launch_checks.py

# The generic kernels by other compilers and for another CPU, one object a source, nothing linked or run.
PORTABLE_CXX ?= aarch64-linux-gnu-g++ clang++
TORCH_INCLUDE = $(shell $(BIN)/python -c "import importlib.util as i; print(i.find_spec('torch').submodule_search_locations[0])")/include
portable: $(STAMPS)/dependencies
	set -e; for compiler in $(PORTABLE_CXX); do command -v $$compiler; for source in $(filter %.cpp,$(SOURCES)); do \
	    $$compiler -std=c++20 -O2 -Wall -Wextra -Werror -Wno-psabi -fvisibility=hidden -fPIC -ffp-contract=off -DFASTKD_CAPABILITY=0 \
	    -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc -isystem $(TORCH_INCLUDE) -c $$source -o /dev/null; done; done

clean:
	rm -rf build dist *.egg-info fastkd/_cpu*.so fastkd/_cuda*.so .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f $(STAMPS)/built $(STAMPS)/cmake $(STAMPS)/cuda
