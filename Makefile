# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Demo settings: `make demo WEIGHTS=pretrained ENCODER=vit_base_patch14_reg4_dinov2` uses real weights.
WEIGHTS ?= random:0
ENCODER ?=

.PHONY: demo test test-slow check fmt clean

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/python -m pipeline.demo run --weights '$(WEIGHTS)' $(if $(ENCODER),--encoder '$(ENCODER)')

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	$(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist worksteal

test-slow: check
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal

fmt: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
