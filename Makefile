# Every target runs in the active virtual environment, or in .venv, which is made where none is active.
# Installing writes to standard error only: the last line of `make demo` on standard output is the job's.

VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.counterpoint-installed

# Another place to take torch from, such as https://download.pytorch.org/whl/cpu (far smaller without a GPU).
TORCH_INDEX ?=
# Three modules of tests at a time: much of a test's time is waiting for processes to start.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
# More arguments of the job, such as `make demo ARGS="seed=1"`.
ARGS ?=

.PHONY: demo test test-all lint format bench clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(RUN) -m jobs.demo configs/digits/demo.yaml $(ARGS)

test: lint
	@$(RUN) -m pytest -m "not slow" $(PARALLEL)

# The slow ones too: network namespaces, kills in long runs, a whole benchmark, and more of what the others test a
# part of, such as further strategies, a population, replicas in a whole run. Here Ray's workers start as on a user's
# cluster, where `make test` forks them from a process that has imported torch and diffusers (tests/forked).
test-all: lint
	@COUNTERPOINT_FORKS= $(RUN) -m pytest $(PARALLEL)

lint: $(INSTALLED)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(INSTALLED)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(INSTALLED)
	@$(RUN) -m jobs.bench heads
	@$(RUN) -m jobs.bench panel

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

# torch goes first: deepspeed comes as source and reads the torch it finds when it is built.
$(INSTALLED): pyproject.toml constraints.txt | $(RUN)
	@echo "installing into $(VENV) (a few minutes the first time)" >&2
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch >&2
	@$(PIP) --editable ".[test]" >&2
	@touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >&2
