# make lift   train OGPO on robosuite Lift until two evaluations in a row are at 0.98 or above
# make test   lint, format check and tests; `make test-all` with the slow ones
# make doctor which simulators and renderers work here, and what mends the others
# make docs   the pages as a site in site/; a broken link or anchor fails it
# All first install into $(VENV), again only when a requirements file changes. Only wheels: no compiler needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --no-warn-conflicts
# On every core, where pip uses one. As with pip, a file of a package that does not compile stops nothing.
COMPILE = $(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

.PHONY: lift test test-all docs doctor

lift: $(VENV)/.installed
	$(VENV)/bin/python ogpo_state.py --env lift --stop-success 0.98

doctor: $(VENV)/.installed
	$(VENV)/bin/python -m tools.doctor

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

test-all: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m ""

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/.installed: requirements.txt requirements-nodeps.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --only-binary :all: -r requirements.txt
	$(PIP) --only-binary :all: --no-deps -r requirements-nodeps.txt
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) --only-binary :all: -r requirements-dev.txt
	$(COMPILE)
	touch $@
