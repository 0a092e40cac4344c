# make demo     the main job on the embedded model; report in demo/report.html
# make test     the whole test suite, offline
# make lint     what .ci/run checks before the tests;  make format  repairs what can be
# make gpu      everything that only a GPU can show (needs torch, triton, nvcc, pytest; no .venv)
# make clean    removes what builds and tools leave; the .venv stays (rm -rf .venv starts over)
#
# The first call makes .venv and installs the package there; later ones reuse it until what it is built from changes.
# PYTHON=python3.12        another interpreter to start from
# PUMICE_CUDA=OFF          leave pumice._cuda out although there is an nvcc
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                          where to look for torch besides pip's own index: PyPI's build for Linux brings gigabytes of
#                          CUDA, this one is for the CPU alone

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f | sort)
# By content and place, not by time: a fresh checkout or another branch and back installs nothing anew.
INSTALLED := .venv/installed-$(shell { pwd; cat $(SOURCES); } | cksum | cut -d ' ' -f 1)

.PHONY: demo test lint format gpu clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/pumice memorization scan examples/prompts.txt --out demo --details 36 --restart

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -type f | xargs $(BIN)/clang-format -i

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build dist demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# $(call need,a command,what to do where it fails)
need = @$(1) >/dev/null 2>&1 || { echo "make: $(2)" >&2; exit 1; }

$(BIN)/python:
	$(call need,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))',$(PYTHON) is not a Python >= 3.11; name one: make PYTHON=python3.12)
	$(call need,$(PYTHON) -c 'import ensurepip',$(PYTHON) cannot make a .venv (on Debian and Ubuntu: apt install python3-venv))
	$(PYTHON) -m venv .venv

# Without build isolation, so that the package is built with the pinned tools.
$(INSTALLED): | $(BIN)/python
	$(call need,command -v $${CXX:-c++},there is no C++17 compiler; install g++ or clang or set CXX)
	$(call need,$(BIN)/python -c 'from os import stat; from sysconfig import get_path; stat(get_path("include") + "/Python.h")',there is no Python.h (on Debian and Ubuntu: apt install python3-dev))
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	rm -f .venv/installed-*
	touch $@
