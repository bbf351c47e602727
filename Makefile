# Two commands: `make serve` and `make test`. Both make .venv on first use. `make gpu` installs nothing.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
STAMP := $(VENV)/.installed
WORKERS ?= 2
GPU_OUT ?= docs/benchmarks/kernels
GPU_BUDGET ?= 450

.PHONY: serve test lint types demo gpu clean

serve: $(STAMP)
	$(VENV)/bin/deltaserve serve --host $(HOST) --port $(PORT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q

demo: $(STAMP)
	$(VENV)/bin/deltaserve demo

# On a machine with a GPU: marked tests, operators and decode steps against their floors, in under 8 minutes, with the
# interpreter that is there. Leaves one JSON record and one table in GPU_OUT.
gpu:
	$(PYTHON) kernels/bench.py gpu --budget $(GPU_BUDGET) --out $(GPU_OUT)

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
