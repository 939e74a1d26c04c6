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
	@echo "make bench   set up, measure the training step beside FSDP2 and DDP, compiled and not (docs/benchmarks)"
	@echo "make setup   only make .venv (PYTHON=..., TORCH=torch==2.13.0, WHEELS=folder without a network)"
	@echo "make clean   delete .venv and what builds leave; work_dirs, where the checkpoints are, stays"

setup:
	@bash scripts/setup.sh

demo: setup
	@$(VENV)/ds-seg demo

test: setup
	@$(VENV)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-faults: JOBS = 3# they wait for a third of their time
test-faults: setup
	@JOBS=$(JOBS) $(VENV)/python scripts/write_faults.py

check: setup
	@$(VENV)/ruff format --check .
	@$(VENV)/ruff check .
	@$(VENV)/mypy

# On two CPU processes; benchmarks/gpu.sh is for a GPU.
STEP := benchmarks/step.py --device cpu --world-size 2 --preset dinov2s --batch 2
ALL_VARIANTS := --variants ds_seg,fsdp2,ddp,ds_seg_compiled,fsdp2_compiled
bench: setup
	@mkdir -p docs/benchmarks
	@$(VENV)/python $(STEP) $(ALL_VARIANTS) --crop 224 --rounds 4 --steps 4 --warmup 2 --json docs/benchmarks/step_224.json
	@$(VENV)/python $(STEP) $(ALL_VARIANTS) --crop 448 --rounds 3 --steps 2 --warmup 1 --json docs/benchmarks/step_448.json
	@$(VENV)/python benchmarks/data.py --json docs/benchmarks/data.json

clean:
	rm -rf .venv build dist *.egg-info
