# Two commands from nothing: `make demo` and `make test`. Both first build the environment in
# .venv (README.md says how long that takes), and reuse it from then on.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Of gpu-check.
MINUTES ?= 10
DEVICE ?= cuda
GPU_ARGS ?=
GIVEN_PYTHONPATH := $(PYTHONPATH)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# A step of the build is done when its file exists. The folder is named after the pins and this
# folder: new pins run every step again, and so does a copied .venv, whose kw_mm would still be
# the one of the other folder. Steps that are satisfied take seconds.
STEPS := $(VENV)/steps/$(shell { pwd; cat requirements.txt; } | cksum | tr ' ' '-')

# The exact pins need it (numpy 2.4); kw_mm itself runs on 3.10. Tested: 3.11.
OLDEST_PYTHON := 3, 11

# These make python or pip look, or install, outside .venv.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-seg test quick coverage test-matrix gpu-check env check lint clean distclean

help:  ## say what can be made
	@echo 'Type one of these; what needs the environment makes it first.'
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo 'Variables: PYTHON=python3.11 (3.11 or newer), MAX_JOBS=2 (files compiled at a time),'
	@echo '  PYTEST_ARGS="tests/models", DEMO_ARGS="--help"'

demo: env  ## train a small detector with KernelWarehouse
	@$(PY) tools/demo.py $(DEMO_ARGS)

demo-seg: env  ## train a small segmentor with KernelWarehouse
	@$(PY) tools/demo.py --config configs/demo/fpn_kw1x-r18_shapes.py $(DEMO_ARGS)

# Most tests are small: a process of one thread per core is faster than one of many threads. Each
# process begins with its part of the files, because what tests of a file share is made once then.
# glibc keeps what is freed: to map the memory of large networks again takes a tenth of their time.
RUN_TESTS := OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 \
	MALLOC_TOP_PAD_=134217728 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

test: lint  ## ruff and mypy, then all tests
	@$(RUN_TESTS) $(PYTEST_ARGS)

coverage: env  ## all tests, and which lines of kw_mm they run: half as long again
	@$(RUN_TESTS) --cov=kw_mm --cov-report=term $(PYTEST_ARGS)

quick: lint  ## ruff and mypy, then the quick tests: what to run before a commit
	@$(RUN_TESTS) -m 'not slow' $(PYTEST_ARGS)

test-matrix:  ## core tests on every torch and Python that is claimed (needs nox; gigabytes)
	@$(PYTHON) -m nox --non-interactive $(NOX_ARGS)

# Without the environment: a machine with a GPU brings its own torch, and mmcv built for it, maybe
# by PYTHONPATH, which other targets must not see.
gpu-check: export PYTHONPATH := $(GIVEN_PYTHONPATH)
gpu-check:  ## check and measure everything on a GPU, with PYTHON as it is (MINUTES=10, DEVICE=cuda)
	@$(PYTHON) tools/benchmark gpu --minutes $(MINUTES) --device $(DEVICE) $(GPU_ARGS)

env: $(STEPS)/checked  ## make .venv, or finish it

check: env  ## check .venv again
	@$(PY) tools/install/check_env.py --pins requirements.txt

lint: env  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m mypy

clean:  ## remove what builds and tests left (not .venv, data, work_dirs)
	rm -rf build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find kw_mm tests tools configs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV) kw_mm/.mim kw_mm/ops/*.so

# A .venv that is there is kept if its python and pip work.
$(STEPS)/venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: there is no command $(PYTHON); type: make PYTHON=python3.11' >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(OLDEST_PYTHON)))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), the pinned packages need Python 3.11" \
	         'or newer (3.11 is tested); type: make PYTHON=python3.11' >&2; exit 1; }; \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo 'error: $(PYTHON) cannot make virtual environments, its modules venv and ensurepip' \
	         'are missing; on Debian and Ubuntu type: apt-get install python3-venv' >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < ($(OLDEST_PYTHON)))' || { \
	  echo "error: $(VENV) has $$($(PY) -V), the pinned packages need Python 3.11 or newer;" \
	       'type: make distclean, then make PYTHON=python3.11 env' >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

# mmcv is compiled against torch with these, so they come before it.
$(STEPS)/torch: $(STEPS)/venv
	@echo '== 1/5 torch and what mmcv is built with'
	@$(PIP) install --upgrade -c requirements.txt pip
	@$(PIP) install -c requirements.txt torch numpy setuptools wheel ninja psutil
	@touch $@

$(STEPS)/mmcv: $(STEPS)/torch
	@echo '== 2/5 mmcv'
	@$(PY) tools/install/build_mmcv.py -c requirements.txt
	@touch $@

$(STEPS)/packages: $(STEPS)/mmcv
	@echo '== 3/5 everything else'
	@$(PIP) install -r requirements.txt
	@touch $@

$(STEPS)/kw_mm: $(STEPS)/packages setup.py pyproject.toml kw_mm/versions.py \
		kw_mm/ops/cpu.cpp
	@echo '== 4/5 kw_mm, editable'
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(STEPS)/checked: $(STEPS)/kw_mm
	@echo '== 5/5 check'
	@$(PY) tools/install/check_env.py --pins requirements.txt
	@touch $@
