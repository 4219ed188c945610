# Every target works in a fresh clone: .venv is made on first use, and brought up to date when the pins change.

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-bench
RECENT := sys; sys.exit(sys.version_info < (3, 10))

.NOTPARALLEL:
.PHONY: demo test lint bench bench-full clean

demo: $(STAMP)
	@$(BIN)/autoplan demo

# What CI runs. Its packaging tests also build the wheel and use it in an environment of its own.
test: lint
	@echo "== pytest"
	@$(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)
	@echo "== ruff, mypy"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

# Every workload beside the peers that matter most; `bench-full`: beside every peer.
bench: $(PEERS)/.installed
	@$(PEERS)/bin/python benchmarks/scoreboard.py

bench-full: $(PEERS)/.installed
	@$(PEERS)/bin/python benchmarks/scoreboard.py --full

clean:
	@rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --no-compile: writing bytecode for all of torch takes longer than the rest; Python does it for what is imported.
$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (once, a minute or more: PyTorch is large)"
	@$(BIN)/python -c 'import pip, $(RECENT)' 2>/dev/null || { \
		$(PYTHON) -c 'import $(RECENT)' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }; \
		$(PYTHON) -m venv --clear $(VENV); }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	@touch $@

# One by one: a peer that does not install here is left out, and its rows say so.
$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	@echo "== installing autoplan and its peers into $(PEERS) (once, some minutes)"
	@$(PYTHON) -c 'import $(RECENT)' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e '.[demo]'
	@grep -v '^#' benchmarks/requirements-peers.txt | while read -r peer; do \
		$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt "$$peer" \
			|| echo "-- without $$peer"; done
	@touch $@
