# Headwater: everything a developer types. `make run` and `make test` install what they need into .venv.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LONG := $(VENV)/.long
EXAMPLE ?= shop
ENGINE ?= embedded
unexport PYTHONDONTWRITEBYTECODE # each of thousands of processes would compile everything again

.PHONY: help install run check test soak bench mutants clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## .venv with headwater and the tools of its developers
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: install ## start an example with live traffic (EXAMPLE=shop|booking ENGINE=embedded|kafka|kafka3)
	@$(BIN)/python -m examples.run $(EXAMPLE) $(ENGINE)

check: install ## style, types, layers and the tests that need no server; under two minutes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest -m "not server and not soak and not long"

test: install ## all tests, on the embedded broker and on Apache Kafka
	@$(BIN)/python -m tests.kit.install
	@nice -n 19 $(BIN)/python -m pytest -m "long and not soak" > $(LONG) 2>&1 & long=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not soak" --durations=30 --durations-min=8; others=$$?; \
	wait $$long; longs=$$?; echo "and those that only compute, which ran beside them:"; cat $(LONG); \
	exit $$((others ? others : longs))

soak: install ## what needs minutes; writes docs/evidence
	@$(BIN)/python -m tests.kit.install
	@$(BIN)/python -m pytest -m soak

bench: install ## measure against Apache Kafka; prints ratios
	@$(BIN)/python -m tests.kit.install
	@$(BIN)/python -m benchmarks

mutants: install ## break each promise in one line and see its test fail
	@$(BIN)/python -m tests.mutants

clean: ## remove what was installed
	rm -rf $(VENV)
