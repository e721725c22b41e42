# make demo | make test     from nothing: virtual environment, install, build, run
# make lint | make benchmark | make clean
# make sanitize             on a GPU: the kernels under compute-sanitizer, all of its tools
#
#   SYSTEM=1      use the Python that is there, offline: build in place, install nothing
#   PYTHON=...    the interpreter to start from (default python3, 3.10 or later)
#   TORCH=...     the torch to install (default torch==2.13.0)
#   PIP_ARGS=...  further arguments of pip install, e.g. an --index-url with CPU builds of torch
#   ARGS=...      further arguments of the demo or of pytest
#   JOBS=...      how pytest shares tests out (default two processes; with SYSTEM=1 one)

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
ARGS ?=
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

ifdef SYSTEM
JOBS ?=
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR):$(CURDIR)/python:$(PYTHONPATH)
BUILT := build/.built-in-place
TEST :=
LINT :=
CLANG_FORMAT := clang-format
else
JOBS ?= -n 2
PY := .venv/bin/python
BUILT := .venv/.built
TEST := .venv/.test
LINT := .venv/.lint
CLANG_FORMAT := .venv/bin/clang-format
PIP := $(PY) -m pip install -q --disable-pip-version-check --no-compile $(PIP_ARGS)
endif

.PHONY: demo test lint format benchmark sanitize clean
demo: $(BUILT)
	$(PY) -m sidmlp demo $(ARGS)

test: $(BUILT) $(TEST)
	$(PY) -m pytest $(JOBS) $(ARGS)

lint: $(BUILT) $(TEST) $(LINT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*' 'tests/*.cu' 'tests/native/*' | xargs $(CLANG_FORMAT) --dry-run --Werror
	$(PY) -m mypy
	$(PY) benchmarks/make_tables.py --check README.md
	$(PY) benchmarks/make_tables.py --check docs/kernels.md
	$(PY) benchmarks/make_tables.py --check docs/training.md

format: $(BUILT) $(LINT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*' 'tests/*.cu' 'tests/native/*' | xargs $(CLANG_FORMAT) -i

benchmark: $(BUILT) $(TEST)
	$(PY) benchmarks/bench_decode.py $(ARGS)
	$(PY) benchmarks/bench_catalogue.py
	$(PY) benchmarks/plot_results.py
	$(PY) benchmarks/make_tables.py --update README.md
	$(PY) benchmarks/make_tables.py --update docs/kernels.md
	$(PY) benchmarks/make_tables.py --update docs/training.md

# ---- compute-sanitizer ----
# `make -kj4 sanitize` runs the tools side by side and all of them, whatever the first one finds. First
# the kernels without torch, in seconds; then the tests, with tensors in allocations of their own, so
# that a read beyond one is seen. The tools slow kernels down many times, hence another time limit.
COMPUTE_SANITIZER ?= compute-sanitizer
SANITIZERS := memcheck racecheck initcheck synccheck
NATIVE := build/native
CHECKS := $(NATIVE)/decode_check $(NATIVE)/encode_check $(NATIVE)/encode_mlp_check

sanitize:
	@command -v $(COMPUTE_SANITIZER) >/dev/null || \
	  { echo "make sanitize needs compute-sanitizer, which comes with the CUDA toolkit; put it on PATH or name it with COMPUTE_SANITIZER=/usr/local/cuda/bin/compute-sanitizer."; exit 1; }
	@$(PYTHON) -c 'import ctypes, sys; cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(); sys.exit(cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0)' 2>/dev/null || \
	  { echo "make sanitize needs an NVIDIA GPU, and the driver finds none here."; exit 1; }
	$(MAKE) $(SANITIZERS:%=sanitize-%)

# synccheck takes a barrier of the whole block for divergence where its warps have parted for good, as
# the ones that copy and the ones that compute have in the encoder's form for long requests, and breaks
# the kernel off; the other tools find nothing in it (H200, CUDA 13.0, 2026-11-22).
PARTED := encode_t5_long

sanitize-%: $(BUILT) $(TEST) $(CHECKS)
	$(COMPUTE_SANITIZER) --tool $* --error-exitcode 1 $(NATIVE)/decode_check --small
	$(COMPUTE_SANITIZER) --tool $* --error-exitcode 1 $(NATIVE)/decode_check --small --cases 20
	$(COMPUTE_SANITIZER) --tool $* --error-exitcode 1 \
	  $(if $(filter synccheck,$*),--kernel-name-exclude kns=$(PARTED)) $(NATIVE)/encode_check --small
	$(COMPUTE_SANITIZER) --tool $* --error-exitcode 1 $(NATIVE)/encode_mlp_check --small
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $* --error-exitcode 1 \
	  --kernel-name-exclude kns=at::native \
	  $(if $(filter synccheck,$*),--kernel-name-exclude kns=$(PARTED)) $(PY) -m pytest -p no:cacheprovider -m sanitize \
	  -k "cuda or triton" --require-cuda -o timeout=1800 $(ARGS)

# Of the objects that the build above has made; up to date, they are taken as they are, so that they
# may come from a machine with nvcc.
$(CHECKS) &: $(SOURCES) $(wildcard tests/native/*.cu tests/native/*.h) | $(BUILT)
	@export PATH="$(CURDIR)/.venv/bin:$$PATH"; command -v nvcc >/dev/null && command -v cmake >/dev/null || \
	  { echo "make sanitize builds $(CHECKS) with nvcc and cmake; install them, or bring these files here, newer than the sources."; exit 1; }
	export PATH="$(CURDIR)/.venv/bin:$$PATH" && \
	tree=build/cmake-$$($(PY) -c 'import sys; print(sys.implementation.cache_tag)') && \
	cmake -S . -B $$tree -DSIDMLP_NATIVE_TESTS=ON && \
	cmake --build $$tree --target decode_check encode_check encode_mlp_check --parallel && \
	mkdir -p $(NATIVE) && cp -f $$tree/native/* $(NATIVE)

# ---- from nothing to a built tree ----
# One clear sentence where the machine lacks something, before minutes are spent on installing.
define check_machine
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sidmlp_kernels needs Python 3.10 or later as $(PYTHON); name another with PYTHON=python3.12."; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "sidmlp_kernels needs a C++ compiler; install one (Debian: apt install g++)."; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || \
	  { echo "sidmlp_kernels needs the headers of $(PYTHON); install them (Debian: apt install python3-dev)."; exit 1; }
	@$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < $(1) * 2**30)' || \
	  { echo "sidmlp_kernels needs $(1) GiB of free disk here ($(CURDIR)); make room and run make again."; exit 1; }
endef

.venv/.packages: pyproject.toml
	$(call check_machine,8)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "sidmlp_kernels needs Python's venv module; install it (Debian: apt install python3-venv)."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)' 'setuptools>=77' wheel pybind11 cmake ninja numpy
	touch $@

.venv/.built: .venv/.packages $(SOURCES)
	$(call check_machine,1)
	$(PIP) --no-build-isolation -e '.[train]'
	touch $@

.venv/.test: .venv/.built
	$(PIP) --no-build-isolation -e '.[test,benchmark]'
	touch $@

.venv/.lint: .venv/.built
	$(PIP) --no-build-isolation -e '.[lint]'
	touch $@

build/.built-in-place: $(SOURCES)
	$(call check_machine,1)
	$(PY) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf build .venv *.egg-info sidmlp_kernels/_lib/*.so
