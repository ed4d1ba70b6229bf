# make demo, make test, make test-vllm, make test-deepspeed, make quality, make bench: each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a process: the tests and the demo's tiny models are slower with more.
RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)

VLLM_PIP := $(VLLM_VENV)/bin/pip --disable-pip-version-check install --quiet
VLLM_TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/pytest

.PHONY: demo test test-vllm vllm-runner-1 vllm-runner-2 test-deepspeed bench quality style clean

demo: $(VENV)/.core
	$(RUN)/hf-adaptive-decode demo --output demo_output --json demo_output/results.json

test: $(VENV)/.dev
	$(RUN)/pytest -n 2 --dist loadfile

test-vllm: $(VLLM_VENV)/.installed
	$(MAKE) --jobs=2 --output-sync=target vllm-runner-1 vllm-runner-2

vllm-runner-1:
	$(VLLM_TEST) tests/vllm_plugin

# vLLM's other model runner, whose kernels are interpreted where there is no GPU.
vllm-runner-2:
	VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 $(VLLM_TEST) tests/vllm_plugin/test_logprobs.py tests/vllm_plugin/test_drafts.py

# Beside the environment, not in it: what finds DeepSpeed imports it. Of its code in C++, which it compiles as it is
# needed, processors need one file.
DEEPSPEED := PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed DS_ACCELERATOR=cpu PATH=$(CURDIR)/$(VENV)/deepspeed/bin:$$PATH

test-deepspeed: $(VENV)/deepspeed/.installed
	$(DEEPSPEED) $(RUN)/pytest tests/test_processes.py -k "zero2 or zero3"

$(VENV)/deepspeed/.installed: $(VENV)/.dev
	$(PIP) wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation --no-deps --target $(VENV)/deepspeed deepspeed==0.19.8
	$(PIP) --target $(VENV)/deepspeed --no-deps hjson msgpack ninja py-cpuinfo einops
	$(DEEPSPEED) $(RUN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
	touch $@

bench: $(VENV)/.dev $(VLLM_VENV)/.installed
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

# vLLM wants other versions of what the rest wants, too, so it has an environment of its own.
$(VLLM_VENV)/.installed: pyproject.toml tests/vllm_plugin/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --no-deps --require-hashes --requirement tests/vllm_plugin/requirements.txt
	$(VLLM_PIP) --no-deps --no-build-isolation --editable .
	$(VLLM_VENV)/bin/python tests/vllm_plugin/name_distribution.py
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info demo_output
