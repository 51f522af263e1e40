# Everyday commands. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test unit slow faults survivors lint locks schema clean

help:           ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv: $(BIN)/quantize  ## the core and the development tools

$(BIN)/quantize: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

demo: venv      ## the main job on the shipped checkpoint
	$(BIN)/quantize run recipes/tiny-llama-awq.yaml

test: venv      ## format, lint, types and all tests
	$(BIN)/python -m tests

unit: venv      ## the tests that need no environments, in seconds
	$(BIN)/python -m pytest tests/unit -q

slow: venv      ## all tests, the slow ones too (over an hour)
	$(BIN)/python -m tests --slow

faults: venv    ## every fault: pushes, 500 kills, full and failing disks (hours)
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults.disks
	$(BIN)/python -m tests.faults.races
	$(BIN)/python -m tests.faults.kills --kills 500

survivors: venv ## a hundred random kills of real runs: nothing survives (an hour or more)
	$(BIN)/python -m tests.faults.survivors

lint: venv      ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

locks: venv     ## compile the environments' locks
	PATH="$(CURDIR)/$(BIN):$$PATH" sh quantize/envs/compile.sh

schema: venv    ## write recipes/recipe.schema.json
	$(BIN)/quantize schema > recipes/recipe.schema.json

clean:          ## remove the virtual environment and caches of this folder
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
