"""Starts the ranks of ranks.py: imports what all of them need, which takes longer than most of their work, and forks.

Usage: start_ranks.py WORLD_SIZE WORKER [ARGUMENT ...]
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

from ds_seg.collector import pause_collector, resume_collector

NEEDED = ("sharded", "ds_seg.checkpoint")
METHODS = {"cpu": "fork", "cuda": "spawn"}
"""By accelerator; a forked process may not use CUDA."""


def run_rank(rank: int, argv: list[str]) -> None:
    """Run the worker as a process that was started with these arguments."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    sys.argv[:] = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def main(world_size: int, argv: list[str]) -> None:
    pause_collector()
    from torch.multiprocessing import start_processes

    for name in NEEDED:
        importlib.import_module(name)
    resume_collector()
    start_processes(run_rank, (argv,), world_size, start_method=METHODS[os.environ["DS_ACCELERATOR"]])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
