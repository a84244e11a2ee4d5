# `make install` puts everything into .venv in this checkout; every other target uses it and installs it first where it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: install demo demo-omni demo-prefer test test-parts test-runs test-long lint settings

install: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo,plot,test]'
	touch $(READY)

# Trains twice on real pictures, on two processes: minutes on two CPU cores.
demo: $(READY)
	$(BIN)/python -m tools.demo runs/demo

# Its second act: sentences, pictures, clips and sounds in a curriculum of five stages, on two processes.
demo-omni: $(READY)
	$(BIN)/python -m tools.demo_omni runs/omni

# Labels of which a tenth are wrong, then right answers preferred to wrong ones, on two processes.
demo-prefer: $(READY)
	$(BIN)/python -m tools.demos.prefer runs/prefer

# Two halves at once, on two cores: most of the time a test waits for processes that it has started. Each line says whose it is.
test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 --keep-going test-runs test-parts

test-runs: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" tests/trainer tests/laws tests/long | sed -u 's/^/runs   /'

test-parts: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" tests/data tests/model tests/preference tests/tools | sed -u 's/^/parts  /'

test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The page of all settings and the schema that editors read, from the config classes.
settings: $(READY)
	$(BIN)/python -m trainer.main --markdown > docs/settings.md
	$(BIN)/python -m trainer.main --schema > docs/run.schema.json
