"""One rank of the parity tests: trains every case, and on two ranks every case with a deliberate mistake.

Usage: worker.py OUTPUT_FOLDER [NAME ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from cases import BF16_CASES, CASES
from ds_seg import distributed
from mutations import MUTATIONS
from sharded_trainer import train_sharded

OUT = Path(sys.argv[1])


def main() -> None:
    distributed.initialize()
    world = distributed.world_size()
    jobs = {name: (lambda recipe=recipe: train_sharded(recipe)) for name, recipe in {**CASES, **BF16_CASES}.items()}
    if world == 2:
        jobs |= {mutation.name: mutation.train for mutation in MUTATIONS}
    if world == 4:
        jobs = {name: jobs[name] for name in CASES}
    trained = {}
    for name in sys.argv[2:] or jobs:
        started = time.perf_counter()
        trained[name] = jobs[name]()
        if distributed.is_main():
            print(f"{time.perf_counter() - started:6.1f} s  {name}", flush=True)
    if distributed.is_main():
        torch.save(trained, OUT / f"world{world}.pt")
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
