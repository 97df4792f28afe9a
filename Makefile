# shardlab: `make` alone lists the targets. Needs GNU make, a POSIX shell and Python >= 3.11, nothing else.
#   make test PYTHON=/usr/bin/python3.13 VENV=.venv-newest     the same with another interpreter, beside the first
#   make test TESTS='tests/test_rules.py -k fsdp'              part of the tests

PYTHON ?= python3
VENV ?= .venv
# Each worker imports JAX (some 4 s and 0.5 GiB) and has 8 pretend devices of its own; 0 means no worker processes.
WORKERS ?= 2
TESTS ?= tests

BIN := $(VENV)/bin
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
UV ?= uv
PIN := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-header --no-annotate pyproject.toml requirements/build.in

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev quickstart test test-all check format bench pins clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r name what; do \
		printf '  make %-11s %s\n' "$$name" "$$what"; done

setup: $(BASE) ## make .venv with the pinned packages that training and figures need

setup-dev: $(DEV) ## the same with what tests and checks need

$(BASE): requirements/base.txt pyproject.toml tools/setup.sh
	@sh tools/setup.sh '$(PYTHON)' '$(VENV)' requirements/base.txt
	@touch $@

$(DEV): requirements/dev.txt requirements/base.txt pyproject.toml tools/setup.sh
	@sh tools/setup.sh '$(PYTHON)' '$(VENV)' requirements/dev.txt
	@touch $(BASE) $@

quickstart: $(BASE) ## train a transformer on 8 pretend devices, then draw its curves
	$(BIN)/shardlab train configs/quickstart.py
	$(BIN)/shardlab figures --out runs/figures

test: $(DEV) ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' $(TESTS)

test-all: $(DEV) ## every test
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

check: $(DEV) ## format, lint, types and tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(MAKE) --no-print-directory test

format: $(DEV) ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## our step against the hand-written one; TORCH=PYTHON also against PyTorch there
	$(BIN)/python benchmarks/compare.py $(if $(TORCH),--torch $(TORCH))

pins: ## resolve requirements/*.txt anew, with uv
	$(PIN) --upgrade --extra dev -o requirements/dev.txt
	$(PIN) --upgrade --extra figures -c requirements/dev.txt -o requirements/base.txt

clean: ## remove what was built or cached; runs/ stays
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name '.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
