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

DEMO_ENV := .venv
TEST_ENV := .venv-test
PIP_OPTIONS := --disable-pip-version-check --quiet --constraint constraints.txt
SOURCES := $(shell find zarr_dask_stream -type f -not -name '*.pyc') $(wildcard README.md LICENSE)

# Without the source folder on the path: what is tested is what was installed.
PYTEST := $(TEST_ENV)/bin/pytest -c pyproject.toml --rootdir . --doctest-modules --durations 10 \
	--numprocesses $(JOBS) --dist loadgroup --pyargs zarr_dask_stream tests

.PHONY: help demo test test-all lint coverage bench bench-all clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_ENV)/.installed ## stream real data through an embedded cluster and show the answer
	$(DEMO_ENV)/bin/zds demo

test: lint ## lint, then all tests but the long ones (of which it runs a sample)
	$(PYTEST) -m "not slow or sample"

test-all: lint ## lint, then every test
	$(PYTEST)

lint: $(TEST_ENV)/.installed ## ruff and mypy
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .
	$(TEST_ENV)/bin/mypy

coverage: $(TEST_ENV)/.installed ## the tests of `make test` with coverage, worst lines shown
	$(PYTEST) -m "not slow or sample" --cov --cov-report term-missing

bench: $(TEST_ENV)/.installed ## chunks a second beside dask.array.from_zarr on the same cluster: a minute or two
	$(TEST_ENV)/bin/python tests/benchmarks/bench_stream.py --out $(RESULTS) --quick

bench-all: $(TEST_ENV)/.installed ## every row of the benchmark, against its limit and its peers: half an hour
	$(TEST_ENV)/bin/python tests/benchmarks/bench_stream.py --out $(RESULTS)

clean: ## remove the environments and everything the tools left
	rm -rf $(DEMO_ENV) $(TEST_ENV) build dist *.egg-info .coverage .coverage.* htmlcov
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

$(DEMO_ENV)/.installed: $(DEMO_ENV)/.requirements $(SOURCES)
	$(DEMO_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@

$(TEST_ENV)/.installed: $(TEST_ENV)/.requirements $(SOURCES)
	$(TEST_ENV)/bin/pip install $(PIP_OPTIONS) --force-reinstall --no-deps .
	@touch $@
