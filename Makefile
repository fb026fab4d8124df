# make demo   the whole method on this machine, from nothing to a report
# make test   the tests
# make test-engines   tests on a Slurm and a Ray cluster of their own, a browser, and runs that are killed again and again
# make docs   the documentation as a site -> site/index.html
# make lint   ruff (rules and formatting) and mypy
# make bench-mix   speed and memory of mixing against a copy, mergekit and a plain script -> benchmarks/mix.json
# make bench-moe   speed of the MoE layer against transformers' and a dense model -> benchmarks/moe.json
# make bench-train   speed and memory of training steps against plain transformers and a dense floor -> benchmarks/train.json
# make bench-asynchrony   N experts, P at once: how much longer than one alone -> benchmarks/asynchrony.json
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-engines docs lint bench-mix bench-moe bench-train bench-asynchrony clean

setup: $(VENV)/.stamp-demo

$(VENV)/.stamp-demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("btx needs Python 3.11 or newer; set PYTHON=python3.12, for example") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/btx run demo device=cpu

# Tests start many processes of btx; compiled modules let them start sooner, whatever the environment says.
test: $(VENV)/.stamp-test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal

# Slurm: apt install slurm-wlm munge; a browser: pip install playwright, apt install chromium. What is not installed skips itself, with the reason.
ENGINES ?= slurm or ray or chaos or texts or long or browser
test-engines: $(VENV)/.stamp-test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadgroup --engines -m "$(ENGINES)" -rs

$(VENV)/.stamp-docs: $(VENV)/.stamp-demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check src tests benchmarks docs/*.py
	$(BIN)/ruff format --check src tests benchmarks docs/*.py
	$(BIN)/mypy

# Needs 30 GB of disk and an hour; --mergekit names an environment with mergekit==0.1.5, left out if it is not there.
bench-mix: $(VENV)/.stamp-test
	$(BIN)/python benchmarks/mix.py

bench-moe: $(VENV)/.stamp-demo
	$(BIN)/python benchmarks/moe.py

# On a GPU the shape of Llama-3.2-1B, 6 minutes; on a CPU a model of hidden size 256, 5 minutes on 2 cores.
bench-train: $(VENV)/.stamp-demo
	$(BIN)/python benchmarks/train.py

# 45 minutes on an idle machine with two processors.
bench-asynchrony: $(VENV)/.stamp-demo
	$(BIN)/python benchmarks/asynchrony.py --output benchmarks/asynchrony.json

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
