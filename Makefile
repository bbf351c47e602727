# Two commands: `make serve` and `make test`. Both make .venv on first use.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: serve test lint types demo clean

serve: $(STAMP)
	$(VENV)/bin/deltaserve serve --host $(HOST) --port $(PORT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q

demo: $(STAMP)
	$(VENV)/bin/deltaserve demo

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)
