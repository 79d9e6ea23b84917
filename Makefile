# The same recipes for people and for CI. Every target makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A third would wait: two, with the Ray clusters that they start, keep two cores busy, and take up to 10 GB.
TEST_PROCESSES := 2
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow real-hands check lint types contracts bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the main job on the embedded default: pipeline.yaml
	$(BIN)/handstill run

test: $(STAMP)  ## the default suite
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(STAMP)  ## full-size networks, fault and fuzz tests
	$(BIN)/python -m pytest -m slow

real-hands: $(STAMP)  ## the whole pipeline on real photographs with a full-size teacher of seeded weights
	test -e runs/real-hands/hamer/data/mano_mean_params.npz || $(BIN)/python ../shared/reference/make_checkpoint.py runs/real-hands/hamer
	$(BIN)/handstill -c tests/e2e/real-hands.yaml run

check: lint types contracts test  ## what CI runs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

BENCHMARKS := $(filter-out benchmarks/train_demo_%.py,$(wildcard benchmarks/*.py))
bench: $(STAMP)  ## every benchmark in its quick form
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script --quick; done
