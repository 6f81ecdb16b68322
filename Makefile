# Everything is installed into .venv beside this file; nothing outside it changes.
#
#   make chat                        set up on first use, then chat
#   make chat TORCH=torch==2.13.0    the same with a torch build of your choice (anything that pip takes)
#   make chat ARGS="--model DIR"     flags for the command

PYTHON ?= python3
TORCH ?= torch
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check
MINIMUM := 3.11

.DEFAULT_GOAL := help
.PHONY: help install chat test test-all lint format clean FORCE

help:
	@echo "make install    set up .venv (about 1 GB on a CPU build of torch; see TORCH= in README.md)"
	@echo "make chat       chat with the demo model, or another: ARGS=\"--model DIR\""
	@echo "make test       the tests; make test-all adds the slow ones"
	@echo "make lint       ruff and mypy; make format rewrites the code's layout"
	@echo "make clean      remove .venv and everything built"

install: $(VENV)/.demo

chat: $(VENV)/.demo
	@$(BIN) run_local.py chat $(ARGS)

test: $(VENV)/.test
	$(BIN) -m pytest -n auto $(ARGS)

test-all: $(VENV)/.test
	$(BIN) -m pytest -n auto -m "" $(ARGS)

lint: $(VENV)/.dev
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: $(VENV)/.dev
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, in a row, so that "make -j" never runs two installations at once.
$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "Installing run-local into $(VENV); torch is large, so this can take some minutes the first time."
	$(PIP) install $$(cat $(VENV)/.torch) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --quiet $$(cat $(VENV)/.torch) --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --quiet $$(cat $(VENV)/.torch) --editable '.[dev]'
	@touch $@

# Which torch was asked for. Changes, and so installs again, only when TORCH is given and differs from the last time.
$(VENV)/.torch: FORCE | $(VENV)/.created
ifeq ($(origin TORCH),file)
	@test -f $@ || echo "$(TORCH)" > $@
else
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@
endif

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "run-local needs Python $(MINIMUM) or newer and found no '$(PYTHON)'. Install it, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MINIMUM)".split("."))))' || { \
	  echo "run-local needs Python $(MINIMUM) or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

FORCE:
