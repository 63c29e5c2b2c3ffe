# `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo stack test test-slow bench bench-quick bench-images chaos soak image lint words format docs docs-site golden screenshots dashboard-preview scale-demo test-llamacpp lock ci test-rabbitmq test-cluster

BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH := .venv/.bench-installed
LLAMACPP := .venv/.llamacpp-installed
SOURCES := worker vqa_worker deploy docs tests
# Without cached bytecode each process of the tests compiles all imports.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv with all dependencies, from the hashed lock

$(INSTALLED): requirements-dev.lock pyproject.toml deploy/local/setup.sh
	@bash deploy/local/setup.sh

demo: $(INSTALLED) ## start RabbitMQ, S3, a simulated model and a worker, and answer sample jobs
	@$(BIN)/python -m deploy.local.demo

stack: $(INSTALLED) ## start RabbitMQ, S3, a model simulator and a worker, until Ctrl-C (WORKER=no: without a worker)
	@$(BIN)/python -m deploy.local $(if $(filter no,$(WORKER)),--no-worker)

PYTEST := $(BIN)/pytest -n 6 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## run the unit and integration tests, on real services (COVERAGE=yes: measure their coverage)
	$(if $(COVERAGE),$(BIN)/coverage erase)
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report=) tests/integration tests/unit
	$(if $(COVERAGE),$(BIN)/coverage report)

test-slow: $(INSTALLED) ## run the slow tests: image, chart, chaos, scaling, memory, dashboard
	$(PYTEST) $(SLOW)

SLOW := tests/slow

$(LLAMACPP): requirements-llamacpp.lock $(INSTALLED)
	@echo "Installing llama.cpp's server"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-llamacpp.lock
	@touch $@

test-llamacpp: $(LLAMACPP) ## run the tests with llama.cpp's server, which constrains answers by a grammar
	$(BIN)/pytest tests/slow/llamacpp

test-rabbitmq: $(INSTALLED) ## run the tests of the broker on other releases of RabbitMQ (10 minutes; Debian, root; RELEASES=…)
	@for release in $(RELEASES); do \
	  echo "RabbitMQ of Debian $$release"; VQA_TEST_RABBITMQ=$$release $(PYTEST) $(BROKER_TESTS) || exit 1; \
	done

test-cluster: $(INSTALLED) ## run workers on a RabbitMQ cluster of three nodes that fail (15 minutes)
	$(BIN)/pytest tests/slow/test_cluster.py

RELEASES := trixie sid
BROKER_TESTS := $(addprefix tests/integration/,permissions cli/dlq $(addprefix cli/test_,check_parts.py check_states.py permissions.py submit.py) \
  $(addprefix test_,broker_addresses.py broker_faults.py broker_refusals.py cancellation.py client.py contract_tables.py control.py killed_worker.py policies.py \
  queue_kinds.py redelivery.py replies.py restore_topology.py session.py start.py stop.py topology_command.py unreadable_messages.py))

$(BENCH): requirements-bench.lock $(INSTALLED)
	@echo "Installing the libraries of the compared workers"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@

bench: $(BENCH) ## compare the worker with others (40 minutes or more; Linux), write docs/performance.md
	@$(BIN)/python -m tests.bench --write docs

bench-quick: $(BENCH) ## short benchmark (under two minutes), prints results only
	@$(BIN)/python -m tests.bench --quick

bench-images: $(BENCH) ## measure what converting images costs (10 minutes; Linux), write docs/images.md (QUICK=yes: print a short version)
	@$(BIN)/python -m tests.bench.conversion $(if $(filter yes,$(QUICK)),--quick,--write docs)

scale-demo: $(BENCH) ## scale workers from zero to the maximum and back like KEDA (8 minutes; Linux), write docs/scaling.md
	@$(BIN)/python -m tests.scaling --write docs

# Options: SEED, SECONDS or MINUTES, WORKERS, RATE, EVERY (seconds between faults) and STORE=no.
CHAOS = $(foreach it,SEED SECONDS MINUTES WORKERS RATE EVERY,$(if $($(it)),--$(shell echo $(it) | tr A-Z a-z)=$($(it)))) \
  $(if $(filter no,$(STORE)),--no-store)

chaos: $(INSTALLED) ## inject random faults around the workers for five minutes (SEED=… SECONDS=… to repeat)
	@$(BIN)/python -m tests.chaos $(CHAOS)

soak: $(INSTALLED) ## measure the memory of one worker during half an hour of faults (Linux; MINUTES=…)
	@$(BIN)/python -m tests.chaos --soak $(CHAOS)

ENGINE = $(or $(shell docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah),\
  $(error docker, podman or buildah is needed to build an image: install one of them, or start Docker))
IMAGE = vqa-worker:$(VERSION)
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' worker/__init__.py)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)

image: ## build the container image with docker, podman or buildah (IMAGE=name:tag, BUILD_FLAGS=…)
	$(ENGINE) build $(BUILD_FLAGS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --tag $(IMAGE) .

lint: $(INSTALLED) ## run the static checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry worker vqa_worker
	$(BIN)/codespell
	$(MAKE) --no-print-directory words IN="$(PLAIN)"
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint Dockerfile deploy/compose/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/chart.py --check
	$(BIN)/python -m deploy.rabbitmq --check
	$(BIN)/python -m deploy.grafana --check
	$(MAKE) --no-print-directory docs-site

# Words and phrases that this project replaced by standard terms, see .codespell/retired.txt.
IN = .
words: $(INSTALLED) ## list retired words and phrases that are still in use (IN=folders)
	@$(BIN)/codespell --dictionary .codespell/retired.txt $(IN); words=$$?; \
	! git grep -niP -f .codespell/phrases.txt -- $(IN) $(WITHOUT_PHRASES) \
	  && exit $$words
WITHOUT_PHRASES := ':!.codespell' ':!*.lock' ':!*.svg' ':!CHANGELOG.md'
# Checked by `make lint`.
PLAIN := README.md CONTRIBUTING.md Makefile pyproject.toml docs examples helm deploy worker vqa_worker tests

format: $(INSTALLED) ## format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## regenerate pages of docs/, the dashboard, files of deploy/rabbitmq/ and of the chart
	$(BIN)/python docs/generate.py
	$(BIN)/python -m deploy.grafana
	$(BIN)/python docs/chart.py
	$(BIN)/python -m deploy.rabbitmq

# Broken links and anchors are errors. REPOSITORY_URL=https://… links to source files.
docs-site: $(INSTALLED) ## build the documentation site into .local/site (REPOSITORY_URL=…)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

screenshots: $(INSTALLED) ## draw what commands show on a terminal into docs/screenshots/ (a minute)
	@$(BIN)/python docs/draw_screenshots.py

dashboard-preview: $(BENCH) ## draw the dashboard with a real load into docs/ (three minutes)
	@$(BIN)/python -m tests.observability.preview

golden: $(INSTALLED) ## update the chart's golden files (tests/slow/helm/golden); review the difference
	$(BIN)/python -m tests.slow.helm.goldens

lock: ## update the locks to the latest releases (requires uv)
	uv pip compile $(LOCK) pyproject.toml --extra images -o requirements.lock
	uv pip compile $(LOCK) pyproject.toml --all-extras --group local --group dev -o requirements-dev.lock
	uv pip compile $(LOCK) pyproject.toml --all-extras -c requirements-dev.lock -o requirements-tracing.lock
	uv pip compile $(LOCK) --group build -c requirements-dev.lock -o requirements-build.lock
	uv pip compile $(LOCK) --group simulator -c requirements-dev.lock -o requirements-simulator.lock
	uv pip compile $(LOCK) pyproject.toml --group bench -c requirements-dev.lock -o requirements-bench.lock
	uv pip compile $(LOCK) --no-deps --group helm -o requirements-helm.lock
	uv pip compile $(LOCK) --group llamacpp -c requirements-dev.lock -c requirements-bench.lock -o requirements-llamacpp.lock
LOCK := --quiet --upgrade --no-strip-extras --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

# Without the tests of images, chaos, memory and a scaling run: `make test-slow` runs those too.
ci: COVERAGE := yes
ci: SLOW := tests/slow/helm $(addprefix tests/slow/test_,alerts.py dashboard.py autoscaler.py client_wheel.py scaling_report.py scaling_simulation.py)
ci: lint test test-slow ## what CI runs: the checks, the tests, and most slow tests
