# Every target sets up .venv first (bootstrap.py: checks the machine, then one pip run; nothing to do when up to date).
# PYTHON names the interpreter that .venv is made from; TORCH_INDEX_URL one more package index to look for torch on;
# WORKERS is how many processes share the tests, file by file, each of them on one core (0: pytest runs them itself).

PYTHON ?= $(shell for python in python3.11 python3; do $$python -c "" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
WORKERS ?= 2
SOURCES := puzzle_trtllm build calibration serve tests bootstrap.py requirements

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?(.*)/  make \1\t\2/' | expand -t 20

setup:  ## check this machine and set up .venv
	@$(or $(PYTHON),$(error no python3 found: sudo apt-get install python3.11 python3.11-venv)) bootstrap.py

demo: setup  ## derive, calibrate, build, serve and measure a Puzzle child of the demo's model (runs/demo)
	@$(BIN)/puzzle-trtllm demo --out runs/demo

test: lint  ## lint, then the tests that take minutes at most, shared between two processes (WORKERS=0: one)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: lint  ## lint, then every test, the slow ones too
	$(BIN)/python -m pytest -m "not gpu"

lint: setup  ## ruff and mypy
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy -p puzzle_trtllm
	$(BIN)/python -m mypy -m bootstrap -m requirements.machine -m requirements.lock

bench: setup  ## measure a running server: make bench ENGINE=folder [URL=localhost:8001] [SCENARIO=cpu-demo]
	@$(BIN)/puzzle-trtllm bench --engine $(or $(ENGINE),$(error which engine? make bench ENGINE=folder)) --url $(or $(URL),localhost:8001) --scenario $(or $(SCENARIO),cpu-demo)

lock: setup  ## resolve requirements/cpu-py311.in anew into cpu-py311.txt (Python 3.11)
	$(BIN)/python requirements/lock.py

clean:  ## remove .venv and everything made by tests and tools (runs/ stays)
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find puzzle_trtllm build calibration serve tests requirements -name __pycache__ -type d -prune -exec rm -rf {} +
