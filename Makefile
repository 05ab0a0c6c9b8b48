# `make check` is what every change must pass; `make test` runs everything.
PYTHON ?= .venv/bin/python
SOURCES = launch.py $(wildcard webui.py modules extensions tests benchmarks training tools)

.PHONY: check format lint types fast test

check: lint types fast

lint:
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)

types:
	$(PYTHON) -m mypy

fast:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow and not browser and not crash"

format:
	$(PYTHON) -m ruff format $(SOURCES)
	$(PYTHON) -m ruff check --fix $(SOURCES)

test:
	python3 launch.py test
