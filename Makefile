# Needs make and python3 (3.11 or newer). All else goes to .venv and to a private PostgreSQL cluster.

PYTHON ?= python3
VENV := .venv
# Much of the suite waits for servers and processes: four jobs keep two cores busy.
JOBS ?= 4
# Of each of three targets.
FUZZ_SECONDS ?= 120

.DEFAULT_GOAL := help
.PHONY: help demo test matrix chaos fuzz lint types bench format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Play a sales day against a private PostgreSQL, and check every activity (DEMO_ARGS)
	@$(VENV)/bin/cdc-worker demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev ## Run the suite against private PostgreSQL servers, one a job (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

matrix: $(VENV)/.installed-dev ## Run what must hold on every server on all that this machine has: 14 to 18 (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'each_server and not chaos' -rfE $(PYTEST_ARGS)

chaos: $(VENV)/.installed-dev ## Run the storms at their full length: kills, crashes, terminated connections (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m chaos $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-fuzz ## Give the decoders whatever may reach more of their code (FUZZ_SECONDS)
	@$(VENV)/bin/python -m fuzz --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed-dev ## Check style and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev ## Check types
	@$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev ## Measure throughput beside pg_recvlogical, and latency (BENCH_ARGS)
	@$(VENV)/bin/python -m bench $(BENCH_ARGS)

format: $(VENV)/.installed-dev ## Mend what can be mended of style and format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## Remove .venv and the tools' caches
	@rm -rf $(VENV) .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) . '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) '.[dev]' '.[demo]'
	@touch $@

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) '.[fuzz]'
	@touch $@
