# Every target does the set-up it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Python for the virtual environment; found if not given: make test PYTHON=/path/to/python3.12
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
# One thread per process: the processes together use the cores, and threads that wait for each other would only spin.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

.PHONY: demo
demo: $(READY) ## train, compress, fine-tune and measure a small network; writes demo/report.html
	$(BIN)/weft demo --out demo

.PHONY: test
test: $(READY) ## run the fast tests and doctests (ARGUMENTS="-k low_rank" selects)
	$(PYTEST) $(ARGUMENTS)

.PHONY: test-slow
test-slow: $(READY) ## run all tests, the slow ones included
	$(PYTEST) -m "slow or not slow" $(ARGUMENTS)

.PHONY: check
check: $(READY) ## linters, formatting, types and the floors of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

.PHONY: format
format: $(READY) ## format the sources and apply the linter's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: $(READY) ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

.PHONY: browser
browser: ## install Chromium, which the tests of the pages drive (Debian and Ubuntu; as root or with sudo)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
	  echo "chromium is there"; \
	elif command -v apt-get >/dev/null; then \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	else \
	  echo "install chromium and chromedriver by your system's packages" >&2; exit 1; \
	fi

.PHONY: experiments-quick
experiments-quick: $(READY) ## a reduced form of every table of the papers: twelve minutes of one core
	$(BIN)/python experiments/run_all.py --quick

.PHONY: experiments
experiments: $(READY) ## every experiment in full: hours; goes on where it was interrupted
	$(BIN)/python experiments/run_all.py

.PHONY: sanitize
sanitize: $(READY) ## the kernels' tests under AddressSanitizer and UBSan (ARGUMENTS="-k sparse" selects)
	$(BIN)/python tools/sanitize.py $(ARGUMENTS)

.PHONY: check-neon
check-neon: $(READY) ## the kernels' ARM copy in an emulator (needs g++-aarch64-linux-gnu and qemu-user)
	$(BIN)/python tools/check_neon.py

.PHONY: wheel
wheel: $(READY) ## build a wheel into dist/ and run its kernels where no compiler is in sight
	$(BIN)/python tools/build_wheel.py

.PHONY: setup venv
setup: $(READY) ## create .venv with the pinned packages and the native build
venv: $(READY) ## the same as setup

.PHONY: clean
clean: ## remove what was built, the virtual environment included
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@for candidate in "$(PYTHON)" python3.11 python3.12 python3.13 python3.14 python3 python; do \
	  if [ -n "$$candidate" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$("$$candidate" --version)"; \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	  if [ -n "$(PYTHON)" ]; then break; fi; \
	done; \
	echo "weft needs Python 3.11 or newer; tried $(or $(PYTHON),python3.11 to python3.14 and python3 and python) in vain." \
	  "Install one or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1

# Built without isolation, so that the build tools are the pinned ones too.
$(READY): pyproject.toml constraints.txt tools/install_torch.py CMakeLists.txt $(wildcard native/*) | $(BIN)/python
	$(BIN)/python tools/install_torch.py
	$(PIP) install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
