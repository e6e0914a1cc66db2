# make quickstart   make test   make lint   make help
# Each target sets up what it needs in .venv and can be run first, alone, or again.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
FLOORS := actors algorithms configs envs orchestrator
# Two makes at the same time share one .venv: the second waits where flock exists.
LOCK := $(shell command -v flock >/dev/null 2>&1 && echo "flock $(VENV).lock")

.NOTPARALLEL:
.PHONY: quickstart test lint clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

quickstart: $(VENV)/.installed-run ## install what a run needs, then train an agent (ARGS="--set run.seed=1")
	$(BIN)/loopwright train quickstart $(ARGS)

test: lint ## install everything, vLLM included, then lint, types and tests (ARGS="-k loop")
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-all .types/loopwright ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix .types/loopwright/,$(FLOORS))

clean: ## remove what make made; runs/ stays
	rm -rf $(VENV) $(VENV).lock .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed-run: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory .make-venv
	@echo "Installing what a run needs into $(VENV) (a few minutes the first time) ..."
	@$(LOCK) $(PIP) install -c constraints.txt -e .
	@touch $@

# First the normal way, so that torch comes with whatever its build needs; then the whole tested set.
$(VENV)/.installed-all: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory .make-venv
	@echo "Installing everything the tests need into $(VENV) (several minutes the first time) ..."
	@$(LOCK) sh -c '$(PIP) install -c constraints.txt -e ".[dev]" && $(PIP) install --no-deps -r constraints.txt'
	@touch $@ $(VENV)/.installed-run

.PHONY: .make-venv
.make-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Loopwright needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(LOCK) sh -c '$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)'

.types/loopwright:
	@mkdir -p .types
	@ln -sfn .. $@
