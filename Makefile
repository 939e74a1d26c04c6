# make demo | test | test-faults | check | bench: each sets up .venv first, once.
.PHONY: help setup demo test test-faults check bench clean
VENV := .venv/bin
TESTS ?= tests
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

help:
	@echo "make demo    set up, fine-tune a small InternViT under ZeRO-3 on two processes, evaluate, draw pictures"
	@echo "make test    set up, run all tests (TESTS=tests/unit for a part, JOBS=4 on more cores)"
	@echo "make test-faults  set up, kill, stop, starve and damage real runs, print what became of them (docs/faults.md)"
	@echo "make check   set up, lint and type-check"
	@echo "make bench   set up, measure the training step side by side with FSDP2 and DDP"
	@echo "make setup   only make .venv (PYTHON=..., TORCH=torch==2.13.0, WHEELS=folder without a network)"

setup:
	@bash scripts/setup.sh

demo: setup
	@$(VENV)/ds-seg demo

test: setup
	@$(VENV)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-faults: setup
	@JOBS=$(JOBS) $(VENV)/python scripts/write_faults.py

check: setup
	@$(VENV)/ruff format --check .
	@$(VENV)/ruff check .
	@$(VENV)/mypy

bench: setup
	@$(VENV)/python benchmarks/step.py

clean:
	rm -rf .venv work_dirs build dist *.egg-info
