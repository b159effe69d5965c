# The commands that README, CI and people use. Everything is set up on first use, and again only when it changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= var

.PHONY: serve test check bench clean
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("manyhats needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[dev]'
	touch $@

serve: $(VENV)/.installed
	$(BIN)/manyhats serve --base smollm2-135m --data $(DATA) --import adapters_store/examples

test: $(VENV)/.installed
	$(BIN)/python -m adapters_store.bases smollm2-135m
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .*_cache
