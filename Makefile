# Needs python3 >= 3.11 and make; everything else is installed into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# where `make interop` keeps environments and folders; READERS="vllm genai" asks these alone
INTEROP ?= build/interop
SOURCES := src tests scripts $(wildcard benchmarks)
# nothing here needs a hub; a library that tries to reach one fails at once instead of waiting
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo demo-finetune test quick large interop check format bench models docs backends dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## quantize, capture, generate, evaluate a real model; prints one table
	@$(BIN)/python scripts/demo.py

demo-finetune: $(INSTALLED) ## train two adapters beside a quantized model, answer with them in ONNX Runtime; two tables
	@$(BIN)/python scripts/demo_finetune.py

test: quick ## the whole suite, with coverage
	$(BIN)/python -m pytest -m real --cov --cov-append --cov-report=term

quick: $(INSTALLED) ## the suite without the demo model: one process per core, each with one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not real and not large' -n auto --dist loadfile --cov --cov-report=

large: $(INSTALLED) ## 1,000 drawn graphs, 1,000 damaged files, onnx's own models, a graph of 3 GiB: half an hour, 8 GB of disk
	$(BIN)/python -m pytest -m large -s

interop: $(INSTALLED) ## show what we write to those who open it, write what they made of it into docs/formats.md: 8 GB, an hour
	PYTHONPATH=tests:scripts $(BIN)/python -m interop.run $(READERS) --folder $(INTEROP)

check: $(INSTALLED) ## format, lint, types, docs up to date
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy --strict src
	$(BIN)/python scripts/make_cli_docs.py --check
	$(BIN)/python scripts/make_configuration_docs.py --check

format: $(INSTALLED) ## let ruff format and fix what it can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(INSTALLED) ## measure speed and quality on the demo model, beside peers that are installed
	$(BIN)/python benchmarks/speed.py

models: $(INSTALLED) ## a tiny model of every causal class of transformers, quantized and read back; writes docs/models.md
	$(BIN)/python scripts/try_models.py

backends: $(INSTALLED) ## install, check and remove every backend, one after the other; writes docs/backends.md: half an hour, 2 GB at a time
	$(BIN)/python scripts/try_backends.py

docs: $(INSTALLED) ## write docs/cli.md from the commands' help, docs/configurations.md from the table of passes
	$(BIN)/python scripts/make_cli_docs.py
	$(BIN)/python scripts/make_configuration_docs.py

dist: $(INSTALLED) ## build wheel and source archive into dist/, and check them
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean: ## remove the environment, the demo's outputs and caches
	rm -rf $(VENV) .demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, PYTHON=... names one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
