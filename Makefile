# Two commands do all the set-up on a fresh machine: `make quick` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: quick test bench lint readme clean

quick: $(VENV)/.installed
	$(BIN)/archbench run quick

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Speed against peers and limits: pytest-benchmark runs the targets, the table says which are met.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/bench/bench_targets.py --benchmark-only -q
	$(BIN)/archbench bench --show results/bench

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Fills in the README from the committed run.
readme: $(VENV)/.installed
	$(BIN)/archbench report results/quick
	$(BIN)/python -m archbench.report.readme results/quick README.md

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
