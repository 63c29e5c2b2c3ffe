# `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo stack test test-slow bench bench-quick chaos soak image lint words format docs golden dashboard-preview scale-demo lock ci

BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH := .venv/.bench-installed
SOURCES := worker deploy docs tests
# Without stored bytecode each process of the tests compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with everything in it, from the hashed lock

$(INSTALLED): requirements-dev.lock pyproject.toml deploy/local/setup.sh
	@bash deploy/local/setup.sh

demo: $(INSTALLED) ## start RabbitMQ, S3 and a simulated model, ask questions about images, show the answers
	@$(BIN)/python -m deploy.local.demo

stack: $(INSTALLED) ## start RabbitMQ, S3 and a model simulator locally (stop with Ctrl-C)
	@$(BIN)/python -m deploy.local

PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## run the unit and integration tests, on real services
	$(BIN)/coverage erase
	$(PYTEST) --cov --cov-report= tests/integration tests/unit
	$(BIN)/coverage report

test-slow: $(INSTALLED) ## run the slow tests: image, chart, chaos, scaling, memory, dashboard
	$(PYTEST) $(SLOW)

SLOW := tests/slow

$(BENCH): requirements-bench.lock $(INSTALLED)
	@echo "Installing what the benchmark compares with"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@

bench: $(BENCH) ## compare the worker with others (40 minutes or more; Linux), write docs/performance.md
	@$(BIN)/python -m tests.bench --write docs

bench-quick: $(BENCH) ## short benchmark (under two minutes), prints results only
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
	$(BIN)/deptry worker
	$(BIN)/codespell
	$(MAKE) --no-print-directory words IN="$(PLAIN)"
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint Dockerfile deploy/compose/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/chart.py --check
	$(BIN)/python -m deploy.rabbitmq --check
	$(BIN)/python -m deploy.grafana --check

# Words and phrases that this project replaced by standard terms: .codespell/retired.txt says which by which.
IN = .
words: $(INSTALLED) ## list retired words and phrases that are still in use (IN=folders)
	@$(BIN)/codespell --dictionary .codespell/retired.txt $(IN); words=$$?; \
	! git grep -niP -f .codespell/phrases.txt -- $(IN) $(WITHOUT_PHRASES) \
	  && exit $$words
WITHOUT_PHRASES := ':!.codespell' ':!*.lock' ':!*.svg' ':!CHANGELOG.md'
# Free of them, and to remain so. The command line, the app and the tests are to follow.
PLAIN := README.md CONTRIBUTING.md docs examples helm deploy $(addprefix worker/,client http images jobs messages model \
  observability processor.py rabbitmq resilience result_store s3 settings)

format: $(INSTALLED) ## put the code in form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## regenerate pages of docs/, the dashboard, files of deploy/rabbitmq/ and of the chart
	$(BIN)/python docs/generate.py
	$(BIN)/python -m deploy.grafana
	$(BIN)/python docs/chart.py
	$(BIN)/python -m deploy.rabbitmq

dashboard-preview: $(BENCH) ## draw the dashboard's data under a real load into docs/ (three minutes)
	@$(BIN)/python -m tests.observability.preview

golden: $(INSTALLED) ## update the chart's golden files (tests/slow/helm/golden); review the difference
	$(BIN)/python -m tests.slow.helm.goldens

lock: ## take the latest releases into the locks (needs uv)
	uv pip compile $(LOCK) pyproject.toml -o requirements.lock
	uv pip compile $(LOCK) pyproject.toml --extra tracing --group local --group dev -o requirements-dev.lock
	uv pip compile $(LOCK) pyproject.toml --extra tracing -c requirements-dev.lock -o requirements-tracing.lock
	uv pip compile $(LOCK) --group build -c requirements-dev.lock -o requirements-build.lock
	uv pip compile $(LOCK) --group simulator -c requirements-dev.lock -o requirements-simulator.lock
	uv pip compile $(LOCK) pyproject.toml --group bench -c requirements-dev.lock -o requirements-bench.lock
LOCK := --quiet --upgrade --no-strip-extras --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

# Images, chaos, memory and a whole scaling run take longer than a change should wait for: run `make test-slow` for those.
ci: SLOW := tests/slow/helm tests/slow/test_alerts.py tests/slow/test_dashboard.py
ci: lint test test-slow ## what CI runs: the checks, the tests, and the slow tests of the chart, the alerts and the dashboard
