# Everything a new user needs: `make demo` and `make test` do all the set-up themselves.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DEMO_DIR ?= demo
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model play test test-all test-browser style quality clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## virtual environment, the package with all extras, FFmpeg's shared libraries

# What comes after the set-up, for who waits for it.
demo: NEXT := the demo: 13 minutes on 2 idle cores
test: NEXT := the tests: 6 minutes on 2 cores
test-all: NEXT := all tests: half an hour on 2 cores

$(VENV)/.installed: pyproject.toml constraints.txt
	@sh .ci/set_up.sh $(PYTHON) $(VENV) $(CONSTRAINTS) "$(NEXT)"

demo: setup  ## record ViZDoom play, build, train and evaluate a small world model (13 minutes on 2 idle cores)
	@echo "== $(NEXT); everything goes to $(DEMO_DIR)/, and a second run continues"
	$(BIN)/python examples/demo.py --output $(DEMO_DIR) $(DEMO_ARGS)

demo-model:
	@test -f $(DEMO_DIR)/model/model.safetensors || { echo "no model in $(DEMO_DIR)/model yet: run 'make demo' first"; exit 1; }

# What the demo has of decoder and figures.
PLAY = $(and $(wildcard $(DEMO_DIR)/decoder/model.safetensors),--decoder $(DEMO_DIR)/decoder) \
	$(and $(wildcard $(DEMO_DIR)/report/metrics.json),--evaluation $(DEMO_DIR)/report)

play: demo-model setup  ## a page to play in what the demo's model imagines, in a browser
	$(BIN)/python examples/explore.py --model $(DEMO_DIR)/model --dataset $(DEMO_DIR)/clips $(PLAY) $(PLAY_ARGS)

# A process a core; tests of a file stay together, since they share what its fixtures have built.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --timeout 900

test: setup  ## the tests: 6 minutes on 2 cores
	@echo "== $(NEXT)"
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: setup  ## slow ones and those for a GPU too: fuzzing, compilers, large shards, killed programs
	@echo "== $(NEXT)"
	$(PYTEST) $(PYTEST_ARGS)

test-browser: setup  ## the page in a real browser: Chromium from Debian's packages, driven by playwright
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } || \
		{ echo "Chromium is missing, and could not be installed: apt-get install chromium (as root)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[browser]"
	$(BIN)/python -m pytest --timeout 900 tests/test_explore_browser.py $(PYTEST_ARGS)

style: setup  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: setup  ## format, lint and type checks, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and the demo's output
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info
