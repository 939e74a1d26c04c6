"""Runs the checks of a worker script on every rank and leaves what all of them found in one file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ds_seg import distributed


def run_checks(worker: Mapping[str, Any], *, only_several_ranks: Collection[str] = ()) -> None:
    """Call a worker's functions named check_*, or those named on the command line, in their order.

    Usage of the worker: WORKER OUTPUT_FOLDER [CHECK ...]. The results, by rank and by name, go to world{N}.json there.

    Args:
        worker: the script's globals().
        only_several_ranks: checks that a single rank leaves out.
    """
    distributed.initialize()
    world_size = distributed.world_size()
    names = sys.argv[2:] or [name for name in worker if name.startswith("check_")]
    results, seconds = {}, {}
    for name in names:
        if world_size > 1 or name not in only_several_ranks:
            started = time.perf_counter()
            results[name] = worker[name]()
            seconds[name] = round(time.perf_counter() - started, 1)
    gathered = distributed.gather_objects(results)
    if distributed.is_main():
        Path(sys.argv[1], f"world{world_size}.json").write_text(json.dumps(gathered, indent=1))
        print(seconds)
    distributed.barrier()
    distributed.shutdown()
