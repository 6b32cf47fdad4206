# make demo, pictures, check, test, lint, notebook, nano: each sets up what it needs, on a machine that has Python 3.11 or later, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run on all cores; those of one file share what they set up.
SPREAD := --numprocesses auto --dist loadfile
# CPU, also where the library of a TPU is installed.
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

.PHONY: demo pictures check test lint notebook nano clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.notebook: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable ".[notebook]"
	touch $@

demo: $(VENV)/.run
	$(BIN)/python -m experiments.demo

demo/page.html:
	$(MAKE) demo

# Of the demo's page, into docs/page. They are taken with Chromium.
pictures: $(VENV)/.test demo/page.html
	$(BIN)/python -m experiments.screenshots demo/page.html docs/page

# The tests for the loop of work, two minutes of two cores: those that are not marked as slow.
check: $(VENV)/.test
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

test: $(VENV)/.test
	$(BIN)/python -m pytest $(SPREAD)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the notebook from top to bottom, and fails at the first cell that raises. It writes nothing.
notebook: $(VENV)/.notebook
	$(BIN)/jupyter execute docs/notebooks/from_prompt_to_pruned.ipynb

# nano from nothing into the folder nano, 80 minutes of two cores; stopped, it goes on. SEED=1 makes another model, with
# other questions, in nano-1. With large pages a step takes a fifth less: XLA asks the system anew for the memory of each.
SEED ?= 0
nano: $(VENV)/.test
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m experiments.nano --seed $(SEED) $(if $(filter-out 0,$(SEED)),nano-$(SEED),nano)

clean:
	rm -rf $(VENV) demo
