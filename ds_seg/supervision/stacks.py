"""Python stacks of all threads, in the work dir and in brief."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path

from ds_seg import distributed

_COLLECTIVES = ("torch/distributed/", "torch/nn/modules/_functions.py", "deepspeed/comm/", "ds_seg/distributed/")
"""The second is SyncBatchNorm's."""
_LOOKED_AT_FRAMES = 4


def write_stacks(work_dir: Path) -> Path:
    """Write where every Python thread of this rank is to `stacks/rank_00000.txt`."""
    path = work_dir / "stacks" / f"rank_{distributed.rank():05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return path


def describe_main_thread() -> tuple[str, bool]:
    """The innermost line of the main thread, and whether it is in a collective, as far as Python's stack tells."""
    identifier = threading.main_thread().ident
    frame = sys._current_frames().get(identifier) if identifier is not None else None
    while frame is not None and frame.f_code.co_filename.startswith("<"):
        frame = frame.f_back  # of Python's own frozen modules
    if frame is None:
        return "nowhere", False
    path = Path(frame.f_code.co_filename)
    place = f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"
    waiting = False
    for _ in range(_LOOKED_AT_FRAMES):
        if frame is not None:
            waiting = waiting or any(part in frame.f_code.co_filename for part in _COLLECTIVES)
            frame = frame.f_back
    return place, waiting
