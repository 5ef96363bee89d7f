# Two commands: `make run` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: run test test-slow lint types setup index teachers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# The main job on the embedded default.
run: setup
	$(BIN)/opd run

# Everything that finishes in minutes.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Rebuilding the embedded teachers, long kills, peers.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# methods/index.json, which `opd list methods` reads, the recipes, the pages of methods and frameworks.
index: setup
	$(BIN)/python -m opd.methods.make_index
	$(BIN)/python docs/make_method_recipes.py
	$(BIN)/python docs/make_method_pages.py
	$(BIN)/python docs/make_framework_page.py
	$(BIN)/python docs/make_audit_page.py

# Rebuild the embedded teachers from nothing.
teachers: setup
	for task in sort add chain; do $(BIN)/opd run recipes/teachers/$$task.toml || exit 1; done

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
