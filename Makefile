# Everything stays in this folder: .venv holds the packages and the settings Jupyter, IPython and
# matplotlib would otherwise keep in the home folder. Needs Python 3.11 or newer and make.

PYTHON ?= python3
RECIPE ?= data/recipes/internvl.yaml data/recipes/qwen2_vl.yaml data/recipes/omni.yaml
DEVICE ?= auto

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
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

.PHONY: help setup reproduce figures test lab clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      install everything into $(VENV) (again only when the pins change)"
	@echo "make reproduce  run the notebooks on all studies; finished ones are skipped"
	@echo "make figures    the same from the beginning"
	@echo "make test       every test, and every notebook against its saved outputs"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make clean      remove runs and caches ($(VENV), data and figures stay)"

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is not;" \
	       "name another: make setup PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@echo "installing the packages of requirements.txt into $(VENV), this takes a few minutes"
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

# What ships is enough: with these, nothing is looked up on the network or in the home folder.
reproduce figures test: export HF_HUB_OFFLINE := 1
reproduce figures test: export HF_HOME := $(CURDIR)/$(VENV)/state/huggingface

reproduce: setup
	$(PY) -m optmerge_core run $(RECIPE) --device $(DEVICE)

figures: setup
	rm -rf $(NAMES:%=runs/%/notebooks)
	$(PY) -m optmerge_core run $(RECIPE) --device $(DEVICE)

test: setup
	$(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout=900 tests notebooks

lab: setup
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -exec rm -rf {} +
