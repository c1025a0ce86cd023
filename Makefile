# Everything a developer or a new user types. `make` lists it.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check bench docs browser clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Make .venv with everything in it; seconds when it is up to date
	@PYTHON="$(PYTHON)" bash scripts/install.sh

quickstart: install ## Tune, export, prove and serve the packaged model
	@$(BIN)/lorikeet quickstart $(ARGS)

test: install browser ## Run the tests
	@$(BIN)/python -m pytest -q $(ARGS)

check: install ## Lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: install ## Run the benchmarks that need nothing else (1.5 hours); each prints a table and writes JSON
	@for name in tuning loop voice load verdict; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

docs: install ## Write docs/reference from the code
	@$(BIN)/python docs/generate.py

browser:
	@bash scripts/browser.sh

clean: ## Remove the environment and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
