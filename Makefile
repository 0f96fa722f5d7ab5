# Everything a new user needs: `make demo` and `make test` do all the set-up themselves.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DEMO_DIR ?= demo
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all style quality clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## virtual environment, the package with all extras, FFmpeg's shared libraries

# What comes after the set-up, for who waits for it.
demo: NEXT := the demo: 9 minutes on 2 idle cores
test: NEXT := the tests: 5 minutes on 2 cores
test-all: NEXT := all tests: half an hour on 2 cores

$(VENV)/.installed: pyproject.toml constraints.txt
	@sh .ci/set_up.sh $(PYTHON) $(VENV) $(CONSTRAINTS) "$(NEXT)"

demo: setup  ## record ViZDoom play, build, train and evaluate a small world model (9 minutes on 2 idle cores)
	@echo "== $(NEXT); everything goes to $(DEMO_DIR)/, and a second run continues"
	$(BIN)/python examples/demo.py --output $(DEMO_DIR) $(DEMO_ARGS)

# A process a core; tests of a file stay together, since they share what its fixtures have built.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --timeout 900

test: setup  ## the tests: 5 minutes on 2 cores
	@echo "== $(NEXT)"
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: setup  ## slow ones and those for a GPU too: fuzzing, compilers, large shards, killed programs
	@echo "== $(NEXT)"
	$(PYTEST) $(PYTEST_ARGS)

style: setup  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: setup  ## format, lint and type checks, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and the demo's output
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info
