# Every target makes its own virtual environment when there is none. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check torture bench clean

# torch first and pinned: on its own it would pull the CUDA build
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations=15

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# hostile cases for as long as it is told: make torture SECONDS=3600
SECONDS ?= 30
torture: $(STAMP)
	$(BIN)/python -m tests.torture --seconds $(SECONDS)

bench: $(STAMP)
	@for script in examples/benchmarks/*.py; do \
	  case $$script in *__init__.py|*/machine.py) continue;; esac; \
	  name=$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m examples.benchmarks.$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) out build dist *.egg-info
