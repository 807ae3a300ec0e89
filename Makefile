VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
ARGS ?=

.PHONY: help install style check test coverage golden docs demo gate clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed  ## create the virtual environment and install qtool in it

# The stamp comes last, so the next make takes up an interrupted installation; a half-made environment starts over.
$(VENV)/.installed: setup.cfg pyproject.toml
	@echo "Installing qtool and its dependencies in $(VENV): about 5 GB with PyTorch, once, a minute or more."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

style: install  ## format the code and fix what ruff can fix
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

check: install  ## lint, format, types, and whether the README's flags and the schemas are current
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(PY) scripts/readme_flags.py --check && $(PY) scripts/write_schemas.py --check

test: install  ## run all tests; ARGS='-m "not slow"' for the quick ones
	@# A process for each core, on one thread each: small networks do not gain from more.
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(ARGS)

coverage: install  ## run all tests, and list the lines and branches they miss
	$(PY) -m coverage run -m pytest $(ARGS) && $(PY) -m coverage report

golden: install  ## remake tests/golden from other implementations
	$(PY) scripts/make_golden.py

docs: install  ## rewrite the README's table of commands and flags, and the schemas of YAML files
	$(PY) scripts/readme_flags.py && $(PY) scripts/write_schemas.py

demo: install  ## quantize the network that comes with qtool, and compare
	$(VENV)/bin/qtool quantize --qe-mode asym_u --qe-per-channel

gate: install  ## quantize the network that comes with qtool, and fail if its accuracy has dropped
	$(VENV)/bin/qtool check configs/ci.yaml

clean:  ## remove caches and build products; the virtual environment stays
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find qtool tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
