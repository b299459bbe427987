# Every target makes the virtual environment and installs what is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := src tests benchmarks examples docs

.PHONY: help demo test test-slow guards claims towers bench bench-scale docs site notebooks check fix clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 …"; exit 2; }
	@echo "installing into $(VENV): several GB with PyTorch, one to three minutes on a fast connection"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train baseline, LiT and 3T on the built-in world, compare them, write a report
	$(RUN)/threetowers demo

test: $(STAMP) ## the test suite
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2

test-slow: $(STAMP) ## the tests marked slow
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench,docs]'
	@if command -v npm > /dev/null; then \
	  npm install --prefix tests/javascript --ignore-scripts --no-package-lock --no-audit --no-fund --silent; fi
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m slow

guards: $(STAMP) ## remove each guard once and check that a test fails; about three minutes
	OMP_NUM_THREADS=1 $(RUN)/python tests/guards.py

claims: $(STAMP) ## the study of the paper's claims, resumable; at most eight hours on two cores
	$(RUN)/threetowers reproduce --records docs/claims/runs --docs docs/claims.md
	$(RUN)/python docs/tables.py

towers: $(STAMP) ## make the package's third towers from nothing, and say whether they are the same; about ten minutes
	$(RUN)/python benchmarks/towers.py

bench: $(STAMP) ## the step, the loss, data and saves beside their peers; an hour of a quiet machine
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	mkdir -p runs/bench
	for name in methods loss processes step e2e embed pieces kept ranks search busy decode store loader checkpoint resume precision accumulate attention allocator jobs explore; do \
	  $(RUN)/python benchmarks/$$name.py --out runs/bench/$$name.json || exit 1; done
	$(RUN)/python benchmarks/page.py

bench-scale: $(STAMP) ## start-up, memory and cost per sample from ten thousand to a million shard entries
	mkdir -p runs/bench
	$(RUN)/python benchmarks/scale.py --out runs/bench/scale.json

docs: $(STAMP) ## write the tables and figures of the documents again
	$(RUN)/python docs/tables.py
	$(RUN)/python docs/figures/make.py

site: $(STAMP) ## the documentation as web pages in build/site; works offline once installed
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	$(RUN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs/site -d build/site-cache . build/site

notebooks: $(STAMP) ## run the notebooks of examples/notebooks; a minute each
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	OMP_NUM_THREADS=1 $(RUN)/jupyter execute examples/notebooks/*.ipynb

check: $(STAMP) ## format, lint and types
	$(RUN)/ruff format --check $(CODE)
	$(RUN)/ruff check $(CODE)
	$(RUN)/mypy

fix: $(STAMP) ## format and mend what ruff can
	$(RUN)/ruff format $(CODE)
	$(RUN)/ruff check --fix $(CODE)

clean: ## remove the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
