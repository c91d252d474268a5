# Everything works from a fresh clone: each target sets up what it needs in .venv first.
#   make CONSTRAINTS=constraints/cuda.txt venv     another platform's tested versions
#   make PYTHON=python3.12 venv                    another interpreter
#   make PYTEST="-x -k resume" test                options of pytest

PYTHON ?= python3
CONSTRAINTS ?= constraints/cpu.txt
VENV := .venv
STAMP := $(VENV)/.installed-$(notdir $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help venv train test test-most test-slurm test-all campaign lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last, so an interrupted installation is taken up again. It names the constraints, so another
# platform's versions replace these.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[cluster,test,lint]'
	touch $@

venv: $(STAMP)  ## create .venv with everything that training, tests and lint need

train: $(STAMP)  ## train the small residual network on DIGITS, and the base optimizer beside it
	$(VENV)/bin/gtddp train digits-ekfac run.baseline=true

test: test-most test-slurm  ## run every test

# Tests of a file share ranks that are started once, so they stay in one process.
test-most: $(STAMP)  ## run the tests but for those on Slurm, in as many processes as there are cores
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --ignore=tests/slurm $(PYTEST)

test-slurm: $(STAMP)  ## run the tests on a real Slurm alone (as root; installs Debian's packages of it)
	$(VENV)/bin/python -m pytest tests/slurm $(PYTEST)

test-all: $(STAMP)  ## the same, with every combination of options on every grid of ranks (hours)
	GTDDP_TEST_ALL=1 $(VENV)/bin/python -m pytest

# What it has is kept in docs/reliability, and what is there is not run again. make campaign PARTS="files numbers"
campaign: $(STAMP)  ## let faults befall runs, for figures (hours; QUICK=1: minutes, and nothing is kept)
	PYTHONPATH=tests $(VENV)/bin/python -m campaign $(if $(QUICK),--quick) $(PARTS)

lint: $(STAMP)  ## check style, formatting and types
	$(VENV)/bin/ruff check gtddp_dist launch tests docs .ci
	$(VENV)/bin/ruff format --check gtddp_dist launch tests docs .ci
	$(VENV)/bin/mypy

clean:  ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find gtddp_dist launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
