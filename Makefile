# Everything runs in .venv, which the first target that needs it sets up. `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# A file's tests share compiled programs, so they run in one process; the longest stand first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench bench-rnn bench-papers bench-networks lint clean

help:
	@echo "make demo      train a deep autoencoder, K-FAC and Hessian-free against Adam and NAG: table and plots in demo/"
	@echo "make test      all tests but the slow ones"
	@echo "make test-all  all tests"
	@echo "make bench     costs and autoencoders into benchmarks/results/, 50 minutes or less at a time; go on by the same command"
	@echo "make bench-rnn the table over long time lags, an hour or less; go on by the same command"
	@echo "make bench-papers  tables of the papers: CurveBall's toys, plateaus, image networks; hours; image networks go on by the same command"
	@echo "make bench-networks  K-FAC beyond autoencoders: a character transformer and image networks, 40 minutes; go on by the same command"
	@echo "make lint      ruff and pyright"

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: .venv/ready
	$(BIN)/python -m benchmarks.demo

test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST)

bench: .venv/ready
	$(BIN)/python -m benchmarks.product_cost
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.autoencoder_bench

bench-rnn: .venv/ready
	$(BIN)/python -m benchmarks.rnn_tasks --table --minutes 60

bench-papers: .venv/ready
	$(BIN)/python -m benchmarks.ravine
	$(BIN)/python -m benchmarks.pch_study
	$(BIN)/python -m benchmarks.curveball_toys
	$(BIN)/python -m benchmarks.cubic_plateau
	$(BIN)/python -m benchmarks.image_tables

bench-networks: .venv/ready
	$(BIN)/python -m benchmarks.char_transformer
	$(BIN)/python -m benchmarks.image_kfac --network small_cnn
	$(BIN)/python -m benchmarks.image_kfac --network resnet20

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo
