# Every target makes its own virtual environment when there is none. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QONNX := $(VENV)-qonnx
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup

# what `make quick` runs: the core and what rooms share; the folder of a room is run by hand (CONTRIBUTING.md)
QUICK := tests/core tests/graph tests/host tests/qpp tests/report tests/test_structure.py tests/test_docs.py

.PHONY: demo quick check results results-check docs test test-slow mutations torture bench clean

# torch first and pinned: on its own it would pull the CUDA build
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m examples.demo

# under a minute on two idle cores: while working
quick: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow" --ignore=tests/core/test_compile_export.py $(QUICK)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m examples.results --check

# the figures of README and docs: PARTS="dqa_table1 qpp_tables" measures the rows that their JSONs lack and renders the
# pages, PARTS=--all everything (hours), PARTS="--all --quick" a small pass into out/results; without PARTS: render only
PARTS ?=
results: $(STAMP)
	$(BIN)/python -m examples.results $(PARTS)

results-check: $(STAMP)
	$(BIN)/python -m examples.results --check

# out/site, from the pages and docstrings alone: nothing of ours is imported, nothing is fetched
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# under 12 minutes: before a commit is handed in
test: $(STAMP)
	$(PYTEST) -m "not slow" --durations=15

# qonnx asks for an older onnx than the rest: an environment of its own
$(QONNX)/.installed: Makefile
	$(PYTHON) -m venv $(QONNX)
	$(QONNX)/bin/python -m pip install --quiet qonnx==1.0.0 onnx==1.20.1 onnxruntime==1.31.1
	touch $@

# the rest: other processes, compilers, whole networks, examples, a sample of the mutations
test-slow: $(STAMP) $(QONNX)/.installed
	DQA_QONNX_PYTHON=$(abspath $(QONNX)/bin/python) $(PYTEST) -m slow --durations=15

# every fault of tests/mutations, two at a time; exit status 1 if one survives
mutations: $(STAMP)
	$(BIN)/python -m tests.mutations --jobs 2

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
	rm -rf $(VENV) $(QONNX) out build dist *.egg-info
