# SPDX-License-Identifier: GPL-2.0-or-later
#
#   make demo     install what is missing, build, show the whole thing on an image file
#   make test     the same set-up, then every test
#   make lint     every linter
#   make help     the rest
#
# Python lives in .venv, Rust in datapath/target; nothing else is written, but for Debian packages when they are missing
# and this is root (or sudo can be). VENV=… chooses another place, BLKSNAP_NO_INSTALL=1 forbids installing packages.

VENV ?= .venv
VM_KERNELS ?= 6.12 7
BIN := $(VENV)/bin
DATAPATH := datapath/target/release/blksnap-datapath
CARGO = $$(tools/find-cargo)
MANIFEST := --manifest-path datapath/Cargo.toml

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-build setup-demo setup-bench setup-test build demo test test-rust test-python test-vm lint format bench wheel clean

help:
	@echo 'make demo    install what is missing, build, show it on an image file'
	@echo 'make test    the same set-up, then every test but test-vm (test-rust, test-python: one half; PYTEST_ARGS=…)'
	@echo 'make test-vm the tests that need a kernel of their own, on every kernel (VM_KERNELS=6.12: on one)'
	@echo 'make lint    ruff, mypy, import-linter, rustfmt, clippy;   make format puts right what can be'
	@echo 'make bench   the benchmarks;   make wheel   one wheel in dist/;   make clean   remove what was made'

# Quick when nothing is missing: tools/setup compares a stamp with pyproject.toml and Cargo.lock. The demo and the
# benchmarks ask for fewer packages than the tests.
setup: setup-test

setup-build setup-demo setup-bench setup-test: setup-%:
	@VENV=$(VENV) tools/setup $*

# The binary beside blksnapd is always the one of the present sources.
build: setup-build
	@$(CARGO) build --quiet --release --locked $(MANIFEST)
	@cmp -s $(DATAPATH) $(BIN)/blksnap-datapath || install -m 755 $(DATAPATH) $(BIN)/blksnap-datapath

demo: setup-demo build
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m demo $(DEMO_ARGS)

test: test-rust test-python

test-rust: setup-build
	$(CARGO) test --locked $(MANIFEST)

test-python: setup-test build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m 'not vm' $(PYTEST_ARGS)

test-vm: setup-test build
	PATH="$(CURDIR)/$(BIN):$$PATH" BLKSNAP_VM_KERNELS='$(VM_KERNELS)' $(BIN)/python -m pytest tests/vm $(PYTEST_ARGS)

lint: setup-build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports --no-logo
	$(CARGO) fmt --check $(MANIFEST)
	$(CARGO) clippy --quiet --locked --all-targets $(MANIFEST) -- -D warnings

format: setup-build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CARGO) fmt $(MANIFEST)

bench: setup-bench build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench $(BENCH_ARGS)

wheel: setup-build
	PATH="$$(dirname $(CARGO)):$$PATH" $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist blksnap.egg-info datapath/target .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@# Only an environment that tools/setup made: VENV may be anything.
	if [ -e "$(VENV)/.blksnap-setup" ]; then rm -rf "$(VENV)"; fi
	find blksnap_service blksnap_tui blksnapctl bench demo tests tools -name __pycache__ -prune -exec rm -rf {} +
