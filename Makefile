# `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo stack test bench bench-quick scale-demo chaos soak lint format docs golden lock ci

BIN := .venv/bin
INSTALLED := .venv/.installed
OCR := .venv/.ocr-installed
BENCH := .venv/.bench-installed
SOURCES := worker deploy docs tests

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with everything in it, from the hashed lock

$(INSTALLED): requirements-dev.lock pyproject.toml deploy/local/setup.sh
	@bash deploy/local/setup.sh

# Lets the stand-in model read the text in pictures; the demo works without it.
$(OCR): requirements-ocr.lock $(INSTALLED)
	@echo "Installing the OCR library of the stand-in model"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-ocr.lock \
	  || echo "(it is not to be had for this Python: the stand-in will not read text)"
	@touch $@

demo: $(INSTALLED) $(OCR) ## start RabbitMQ, S3 and a model, ask questions about pictures, show the answers
	@$(BIN)/python -m deploy.local.demo

stack: $(INSTALLED) ## start RabbitMQ, S3 and the stand-in model to try things with, until Ctrl-C
	@$(BIN)/python -m deploy.local up

test: $(INSTALLED) ## run the tests, on real services
	$(BIN)/coverage erase
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report

$(BENCH): requirements-bench.lock $(INSTALLED)
	@echo "Installing what the benchmark compares with"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@

bench: $(BENCH) ## measure the worker beside others (40 minutes or more; Linux), write docs/performance.md
	@$(BIN)/python -m tests.bench --write docs

bench-quick: $(BENCH) ## the same in short, under two minutes, told only
	@$(BIN)/python -m tests.bench --quick

scale-demo: $(BENCH) ## scale workers from zero to the most and back as KEDA would (8 minutes; Linux), write docs/scaling.md
	@$(BIN)/python -m tests.scaling --write docs

# SEED, SECONDS or MINUTES, WORKERS, RATE, EVERY (so many seconds a fault) and STORE=no may be given.
CHAOS = $(foreach it,SEED SECONDS MINUTES WORKERS RATE EVERY,$(if $($(it)),--$(shell echo $(it) | tr A-Z a-z)=$($(it)))) \
  $(if $(filter no,$(STORE)),--no-store)

chaos: $(INSTALLED) ## let everything around the worker go wrong for five minutes (SEED=… SECONDS=… to repeat)
	@$(BIN)/python -m tests.chaos $(CHAOS)

soak: $(INSTALLED) ## one worker for half an hour of milder faults: does it grow? (Linux; MINUTES=…)
	@$(BIN)/python -m tests.chaos --soak $(CHAOS)

lint: $(INSTALLED) ## run the static checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry worker
	$(BIN)/codespell
	$(BIN)/yamllint --strict .
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/chart.py --check

format: $(INSTALLED) ## put the code in form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## write the generated pages of docs/, and what the chart has from elsewhere, anew
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/chart.py

golden: $(INSTALLED) ## write anew what the chart's ci/ files render to (tests/helm/golden): look at the difference
	$(BIN)/python -m tests.helm.goldens

lock: ## take the latest releases into the locks (needs uv)
	uv pip compile $(LOCK) pyproject.toml -o requirements.lock
	uv pip compile $(LOCK) pyproject.toml --group local --group dev -o requirements-dev.lock
	uv pip compile $(LOCK) pyproject.toml --group ocr -c requirements-dev.lock -o requirements-ocr.lock
	uv pip compile $(LOCK) pyproject.toml --group bench -c requirements-dev.lock -c requirements-ocr.lock \
	  -o requirements-bench.lock
LOCK := --quiet --upgrade --no-strip-extras --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

ci: lint test ## what CI runs: the checks and the tests
