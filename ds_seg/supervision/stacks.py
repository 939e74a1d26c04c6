"""Python stacks of all threads, in the work dir and in brief."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path
from types import FrameType

from ds_seg import distributed

_COLLECTIVES = (
    "torch/distributed/",
    "torch/nn/modules/_functions.py",  # SyncBatchNorm's
    "ds_seg/models/sync_batchnorm.py",
    "deepspeed/comm/",
    "ds_seg/distributed/",
)
_BACKWARD = "_engine_run_backward"
_LOOKED_AT_FRAMES = 4


def write_stacks(work_dir: Path) -> Path:
    """Write where every Python thread of this rank is to `stacks/rank_00000.txt`."""
    path = work_dir / "stacks" / f"rank_{distributed.rank():05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return path


def describe_main_thread() -> tuple[str, bool]:
    """The innermost line of what the main thread does, and whether it is in a collective, as far as Python tells.

    A collective of NCCL returns at once, and it is for the GPU that the process then waits. A backward pass on a GPU
    has a thread of its own, whose Python code is looked at where it runs any.
    """
    frames = sys._current_frames()
    frame = frames.pop(threading.main_thread().ident or 0, None)
    # this function's own frame has `frames`: in a cycle all of them would live on, with the tensors of a step in them
    frames.pop(threading.get_ident(), None)
    waiting = False
    if frame is not None and frame.f_code.co_name == _BACKWARD and distributed.device().type == "cuda":
        frame = next((other for other in frames.values() if not _is_of_python(other)), frame)
        waiting = frame.f_code.co_name == _BACKWARD  # for kernels to be launched behind those that wait
    while frame is not None and frame.f_code.co_filename.startswith("<"):
        frame = frame.f_back  # of Python's own frozen modules
    if frame is None:
        return "nowhere", False
    path = Path(frame.f_code.co_filename)
    place = f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"
    for _ in range(_LOOKED_AT_FRAMES):
        if frame is not None:
            waiting = waiting or _is_waiting(frame)
            frame = frame.f_back
    return place, waiting


def _is_waiting(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    for_gpu = "torch/cuda/" in path and frame.f_code.co_name == "synchronize"
    return for_gpu or any(part in path for part in _COLLECTIVES)


def _is_of_python(frame: FrameType) -> bool:
    """Whether a thread was started by Python's `threading`, unlike those of torch."""
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename == threading.__file__
