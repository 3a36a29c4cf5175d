# Two commands from a fresh clone: `make demo` and `make test`. Python 3.11+ on Linux; everything goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
DEMO ?= demo-out

.PHONY: demo test test-integration lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m jobs.demo --out $(DEMO)

# Files side by side in two processes of one torch thread.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --ignore tests/integration

# One by one: Ray clusters, a real S3 server and a browser, which infra/test-packages.sh installs where they are missing.
test-integration: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest tests/integration

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DEMO)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"needs Python 3.11 or newer, got {sys.version}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a range would fetch another build of several GB.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[pipeline]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[pipeline,test]'
	touch $@
