# Everything a fresh Debian needs for this file: python3 (3.11 or newer) and make. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Any interpreter from 3.11 on: make test PYTHON=python3.13
PYTHON ?= python3
# Test processes; tests on real servers always share one of them.
JOBS ?= 2
# Where reports go that people may want to keep.
RESULTS ?= bench-results

# PyTorch, for the tests marked `torch` and for the benchmark. Where there is no build for processors alone it is
# gigabytes: `make test-all TORCH=` does without it, and leaves those tests out; `make bench TORCH=` does, too.
TORCH ?= torch==2.13.0

DEMO_ENV := .venv
TEST_ENV := .venv-test
BENCH_ENV := .venv-bench
DOCS_ENV := .venv-docs
PIP_OPTIONS := --disable-pip-version-check --quiet --constraint constraints.txt
SOURCES := $(shell find zarr_dask_stream -type f -not -name '*.pyc') $(wildcard README.md LICENSE)

# Without the source folder on the path: what is tested is what was installed.
PYTEST := $(TEST_ENV)/bin/pytest -c pyproject.toml --rootdir . --doctest-modules --durations 10 \
	--numprocesses $(JOBS) --dist loadgroup --pyargs zarr_dask_stream tests

.PHONY: help demo test test-all lint coverage bench bench-all bench-publish docs matrix clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_ENV)/.installed ## stream real data through an embedded cluster and show the answer
	$(DEMO_ENV)/bin/zds demo

test: lint ## lint, then all tests but the long ones (of which it runs a sample)
	$(PYTEST) -m "(not slow or sample) and not torch"

test-all: lint $(if $(TORCH),$(TEST_ENV)/.torch) ## lint, then every test
	$(PYTEST) $(if $(TORCH),,-m "not torch")

lint: $(TEST_ENV)/.installed ## ruff and mypy
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .
	$(TEST_ENV)/bin/mypy

coverage: $(TEST_ENV)/.installed ## the tests of `make test` with coverage, worst lines shown
	$(PYTEST) -m "(not slow or sample) and not torch" --cov --cov-report term-missing

bench: $(BENCH_ENV)/.installed $(if $(TORCH),$(BENCH_ENV)/.torch) ## every row of the benchmark with less data, against limits and peers: about 40 minutes
	$(BENCH_ENV)/bin/python tests/benchmarks/bench_stream.py --out $(RESULTS) --smaller

bench-all: $(BENCH_ENV)/.installed $(if $(TORCH),$(BENCH_ENV)/.torch) ## every row at full size: an hour and a half or more
	$(BENCH_ENV)/bin/python tests/benchmarks/bench_stream.py --out $(RESULTS)

bench-publish: $(BENCH_ENV)/.installed ## put the figures of the last benchmark into the README
	$(BENCH_ENV)/bin/python tests/benchmarks/figures.py $(RESULTS)/results.json --publish

docs: $(DOCS_ENV)/.installed ## build the site in docs/ into site/, warnings are errors
	$(DOCS_ENV)/bin/mkdocs --quiet build --strict
	@echo "open site/index.html"

matrix: $(DOCS_ENV)/.installed ## wheel, extras and dependencies, oldest and newest, on each Python from 3.11 to 3.13
	$(DOCS_ENV)/bin/nox

clean: ## remove the environments and everything the tools left
	rm -rf $(DEMO_ENV) $(TEST_ENV) $(BENCH_ENV) $(DOCS_ENV) .nox site build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache $(RESULTS)
	find zarr_dask_stream tests -type d -name __pycache__ -prune -exec rm -rf {} +

# An environment is made anew when its requirements change, and gets the package anew when only the package changes.
define make_env
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory .ensure-venv
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
endef

.PHONY: .ensure-venv
.ensure-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv; \
	else \
		echo "This Python cannot make virtual environments: run 'sudo apt-get install python3-venv' first." >&2; exit 1; \
	fi

$(DEMO_ENV)/.requirements: pyproject.toml constraints.txt
	$(make_env)
	$(DEMO_ENV)/bin/pip install $(PIP_OPTIONS) '.[demo]'
	@touch $@

$(TEST_ENV)/.requirements: pyproject.toml constraints.txt
	$(make_env)
	$(TEST_ENV)/bin/pip install $(PIP_OPTIONS) '.[test]'
	@touch $@

$(BENCH_ENV)/.requirements: pyproject.toml constraints.txt
	$(make_env)
	$(BENCH_ENV)/bin/pip install $(PIP_OPTIONS) '.[bench]'
	@touch $@

$(DOCS_ENV)/.requirements: pyproject.toml constraints.txt
	$(make_env)
	$(DOCS_ENV)/bin/pip install $(PIP_OPTIONS) '.[docs]'
	@touch $@

$(TEST_ENV)/.torch: $(TEST_ENV)/.requirements | $(TEST_ENV)/.installed
	$(TEST_ENV)/bin/pip install $(PIP_OPTIONS) '$(TORCH)'
	@touch $@

$(BENCH_ENV)/.torch: $(BENCH_ENV)/.requirements | $(BENCH_ENV)/.installed
	$(BENCH_ENV)/bin/pip install $(PIP_OPTIONS) '$(TORCH)'
	@touch $@

$(DEMO_ENV)/.installed: $(DEMO_ENV)/.requirements $(SOURCES)
	$(DEMO_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@

$(TEST_ENV)/.installed: $(TEST_ENV)/.requirements $(SOURCES)
	$(TEST_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@

$(BENCH_ENV)/.installed: $(BENCH_ENV)/.requirements $(SOURCES)
	$(BENCH_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@

$(DOCS_ENV)/.installed: $(DOCS_ENV)/.requirements $(SOURCES)
	$(DOCS_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@
