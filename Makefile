# Few verbs: setup, demo, test, check, wheel, clean. Needs Python 3.11 or later and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test check wheel clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## the main job, offline, on the embedded model and images
	rm -rf runs/demo
	$(BIN)/blackbox-vlm demo --out runs/demo

test: setup  ## the whole suite
	$(BIN)/python -m pytest

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup  ## dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv build dist runs/demo *.egg-info
