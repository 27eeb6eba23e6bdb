# Every target sets up what it needs: a virtual environment in .venv and the package in it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test test-slow check docs format clean

study: .venv/.installed
	$(BIN)/python -m study.launch $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry bimask study

docs: .venv/.installed-dev
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[study]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[study,dev,aws,gcp,head]'
	touch $@

clean:
	rm -rf .venv outputs build
