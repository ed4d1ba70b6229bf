# make demo, make test, make quality, make bench: each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a process: the tests and the demo's tiny models are slower with more.
RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)

.PHONY: demo test bench quality style clean

demo: $(VENV)/.core
	$(RUN)/hf-adaptive-decode demo --output demo_output --json demo_output/results.json

test: $(VENV)/.dev
	$(RUN)/pytest -n 2 --dist loadfile

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone: what follows then keeps the build that is there.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[viz]"
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
