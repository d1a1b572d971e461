# Everything runs in .venv, which the first target that needs it sets up. `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint types clean

help:
	@echo "make demo      train a classifier and an autoencoder, second order against Adam: table and plot in demo/"
	@echo "make test      all tests but the slow ones"
	@echo "make test-all  all tests"
	@echo "make bench     costs and benchmarks into benchmarks/results/"
	@echo "make lint      ruff and pyright"

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: .venv/ready
	$(BIN)/python -m benchmarks.demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS)

bench: .venv/ready
	$(BIN)/python -m benchmarks.product_cost

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo
