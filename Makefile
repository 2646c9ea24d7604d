# One virtual environment, made from pinned constraints; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where pip finds torch, and torch alone: what it needs comes from PyPI, whose versions constraints.txt pins.
# Empty: PyPI. On Linux without a GPU, point it at an index of CPU builds to save gigabytes.
TORCH_INDEX ?=
DATA ?= .lora-repair
# Suites side by side, one thread each: tiny models are slower on several.
JOBS ?= 2
PACKAGES := gate pages repair endpoints ledger worker api cli migrations
LINTED := $(PACKAGES) tests bench examples

.PHONY: demo test flow check bench bench-efficacy bench-stats bench-plots up clean pins generated
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lora-repair needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[worker,local,test]'
	@touch $@

demo: $(INSTALLED)  ## Upload a poisoned, an innocent and a hostile adapter, and print what became of them
	$(BIN)/lora-repair demo --data-dir $(DATA)/demo

up: $(INSTALLED)  ## Run the whole service on this machine
	$(BIN)/lora-repair up --data-dir $(DATA)

test: $(INSTALLED)  ## Every suite on SQLite, PostgreSQL and Valkey, and the whole way with the real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

flow: $(INSTALLED)  ## Only the whole way with the real model: killed workers, a wiped broker
	$(BIN)/python -m pytest -m model

check: $(INSTALLED)  ## Format, lint, types, import walls, generated files, migrations
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.generated --check
	$(BIN)/hadolint docker/Dockerfile

generated: $(INSTALLED)  ## Write the generated files again: method catalogue, OpenAPI, README table
	$(BIN)/python -m tests.generated

bench: $(INSTALLED)  ## Speed and memory, as ratios against a faithful baseline in the same run
	$(BIN)/python -m bench

bench-efficacy: $(INSTALLED)  ## Every method on every adapter of the zoo with the real model: hours, goes on where it stopped
	$(BIN)/python -m bench.efficacy --data $(DATA)/demo
	$(BIN)/python -m bench.efficacy.table

bench-stats: $(INSTALLED)  ## How often every interval, test, stopping rule and gate errs, simulated: docs/statistics.md
	$(BIN)/python -m bench.coverage

bench-plots: $(INSTALLED)  ## Draw the plots of docs/efficacy.md from the committed numbers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot]'
	$(BIN)/python -m bench.efficacy.plots

pins:  ## Resolve the newest stack and write constraints.txt
	rm -rf build/pins && $(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	build/pins/bin/python -m pip install --quiet '.[worker,local,test,plot]'
	{ head -1 constraints.txt; build/pins/bin/python -m pip freeze --exclude lora-repair | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) $(DATA) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
