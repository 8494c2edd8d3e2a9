# Two commands do all the set-up on a fresh machine: `make quick` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: quick test bench gate lint readme clean

quick: $(VENV)/.installed
	$(BIN)/archbench run quick

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Speed against peers and limits: pytest-benchmark runs the targets, the table says which are met.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/bench/bench_targets.py --benchmark-only -q
	$(BIN)/archbench bench --show results/bench

# Counts and quality against baselines/smoke.jsonl. Exit code 3, undecided, is no failure; `archbench gate --accept`
# acknowledges what was meant to change.
gate: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/archbench gate --tiers 0,1 || test $$? -eq 3

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the committed runs' reports anew, and fills in the README from their records.
readme: $(VENV)/.installed
	for run in $(filter-out results/bench/%,$(wildcard results/*/*.jsonl)); do $(BIN)/archbench report $$(dirname $$run) || exit; done
	$(BIN)/python -m archbench.report.readme README.md

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
