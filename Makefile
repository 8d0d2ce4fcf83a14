PYTHON ?= .venv/bin/python

.PHONY: install test lint format types demo

install:
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e ".[dev]"

test:
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n 2

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:
	$(PYTHON) -m mypy

demo:
	$(PYTHON) -m hf_cnllm demo
