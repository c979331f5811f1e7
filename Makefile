# Everything runs in .venv, installed from pyproject.toml under the exact versions of constraints.txt.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
SHARDS := shards/digits

.DEFAULT_GOAL := help
.PHONY: help demo test chaos timing soak check install bench mlflow clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or newer on the PATH, or make PYTHON=/path/to/python3"; exit 2; }
	@echo "installing into .venv (about 7 GB with PyTorch's CUDA build; a few minutes the first time)"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: .venv/.installed ## make .venv with everything in it

demo: install ## shards, pretraining on Ray, probes, picture and record, on this machine in a few minutes
	$(RUN) -m pipelines.make_shards --source digits --split train --out $(SHARDS)/train
	$(RUN) -m pipelines.make_shards --source digits --split test --out $(SHARDS)/test
	$(RUN) -m pipelines.pretrain --config pipelines/recipes/digits.toml

test: install ## run the tests, in two processes
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

chaos: install ## run the tests that kill more processes, for some minutes more
	$(RUN) -m pytest -m chaos

timing: install ## run the tests that judge wall-clock time; nothing else should run beside them
	$(RUN) -m pytest -m timing

soak: install ## a run on a cluster on this machine whose workers and nodes are killed, for 30 minutes
	$(RUN) -m benchmarks.soak --minutes 30 --json soak.json

check: install ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright --level error

bench: install ## measure training steps on this machine, in some 20 minutes, and run the tests of timing
	$(RUN) -m benchmarks.step
	$(RUN) -m pytest -m timing

mlflow: install ## open the record of the runs in runs/ in the MLflow UI on port 5000
	.venv/bin/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

clean: ## delete caches, demo shards and the environment; runs/ stays
	rm -rf .venv $(SHARDS) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
