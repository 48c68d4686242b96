# make demo and make test start from nothing but Python 3.11+ and a package index; the other targets build on them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A plain build of this torch is small where the index has one; any torch of the range in pyproject.toml will do.
TORCH ?= torch==2.13.0

.PHONY: demo test slow check docs setup bench gpu experiment testbed notebooks readme-figures clean

demo: setup
	$(BIN)/internal-policy analyze --model testbed/qwen3 --model testbed/llama
	$(BIN)/python benchmarks/demo_training.py

test: setup
	$(BIN)/python -m pytest -n auto

slow: setup
	$(BIN)/python -m pytest -m slow -n auto

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# The site, in build/docs; a warning ends it. (The variable silences a notice of the theme's about another program.)
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d build/docs

bench: setup
	$(BIN)/python benchmarks/benchmark_analysis.py
	$(BIN)/python benchmarks/benchmark_update.py

# On a machine with an NVIDIA GPU: the kernel's rate, the tests that need CUDA, an analysis and updates at the shape of
# Qwen3-4B. Three minutes on an H200.
gpu: setup
	$(BIN)/python benchmarks/gpu_checks.py
	$(BIN)/python benchmarks/gpu_checks.py --document

# The experiments on BuPO (all of them, or PART=e1), the checkpoints of one BuPO training compared, and what notebook 05
# draws: data/experiments, figures/experiments and the tables of docs/results.md. Hours; resumable.
experiment: setup
	$(BIN)/python scripts/experiments/run.py $(addprefix --part ,$(PART))
ifeq ($(PART),)
	$(BIN)/python scripts/experiments/layers.py
	$(BIN)/python benchmarks/checkpoint_sweep.py
endif
	$(BIN)/python scripts/experiments/summaries.py
	$(BIN)/python scripts/experiments/draw.py
	$(BIN)/python scripts/experiments/pages.py
ifeq ($(PART),)
	$(BIN)/python scripts/experiments/stored_results.py
endif

testbed: setup
	$(BIN)/python scripts/testbed/make.py

# Runs every notebook in a fresh kernel, offline, and stores its outputs.
notebooks: setup
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/execute.py

# The pictures of the README, from an analysis of the embedded models.
readme-figures: setup
	$(BIN)/internal-policy analyze --model testbed/qwen3 --model testbed/llama --output build/readme --overwrite
	mkdir -p figures/readme
	cp $(addprefix build/readme/figures/*/,fig2_entropy_flow.png fig3_entropy_change.png change_parts.png) figures/readme/

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python %d.%d found; needed is 3.11 or newer: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
