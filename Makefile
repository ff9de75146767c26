# Needs make and python3 (3.11 or newer). All else goes to .venv and to a private PostgreSQL cluster.

PYTHON ?= python3
VENV := .venv
# Much of the suite waits for servers and processes: four jobs keep two cores busy.
JOBS ?= 4
# Of each of three targets.
FUZZ_SECONDS ?= 120
SOAK_SECONDS ?= 1200

.DEFAULT_GOAL := help
.PHONY: help demo test matrix chaos soak fuzz lint types docs package audit bench format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Play a sales day against a private PostgreSQL, and check every activity (DEMO_ARGS)
	@$(VENV)/bin/cdc-worker demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev ## Run the suite against private PostgreSQL servers, one a job (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

matrix: $(VENV)/.installed-dev ## Run what must hold on every server on all that this machine has: 14 to 18 (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'each_server and not chaos' -rfE $(PYTEST_ARGS)

# On all servers that are there, which takes many times as long: PYTEST_ARGS='-m chaos'.
chaos: $(VENV)/.installed-dev ## Run the storms at their full length: kills, crashes, cut networks; ends with a table of them (JOBS, PYTEST_ARGS)
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'chaos and not matrix' $(PYTEST_ARGS)

soak: $(VENV)/.installed-dev ## Let all that goes wrong happen at random and together, and print what came of it (SOAK_SECONDS)
	@SOAK_SECONDS=$(SOAK_SECONDS) $(VENV)/bin/python tests/soak.py

fuzz: $(VENV)/.installed-fuzz ## Give the decoders whatever may reach more of their code (FUZZ_SECONDS)
	@$(VENV)/bin/python -m fuzz --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed-dev ## Check style and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev ## Check types
	@$(VENV)/bin/mypy

docs: $(VENV)/.installed-docs ## Build the documents into build/site, with strict links
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

package: $(VENV)/.installed-dev ## Build wheel and sdist into dist
	@$(VENV)/bin/python -m build --quiet --outdir dist .

audit: $(VENV)/.installed-audit ## Ask whether a dependency, as installed, is known to be vulnerable (AUDIT_ARGS)
	@$(VENV)/bin/python scripts/audit $(AUDIT_ARGS)

# For two hours or so; with Debezium's engine beside it: .venv/bin/pip install '.[bench-debezium]', and Java.
bench: $(VENV)/.installed-bench ## Measure throughput, latency and price beside peers, into docs/benchmarks (BENCH_ARGS)
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

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) . '.[bench]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) '.[docs]'
	@touch $@

$(VENV)/.installed-audit: $(VENV)/.installed
	@PYTHON='$(PYTHON)' scripts/venv $(VENV) '.[audit]'
	@touch $@
