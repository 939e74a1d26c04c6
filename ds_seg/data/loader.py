"""Samples loaded ahead in processes of their own, in order, and what goes wrong in them raised here."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_seg.data.handover import TellingContext
from ds_seg.supervision.processes import end_with_parent

_main_exits = multiprocessing.get_context("fork").RawValue("b", 0)
"""In memory that worker processes share with this one."""
# A thread of gloo or NCCL that lets go of a tensor takes the lock of Python's list of threads, without the GIL. If a
# fork comes just then, the child waits for that lock for ever (Python 3.11). This takes it, and so waits for it.
os.register_at_fork(before=sys._current_frames)


def load_ahead(
    dataset: Dataset,
    batches: Iterable[list[int]],
    collate: Callable[[list[Any]], Any],
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Iterate over batches of a dataset; the process's own random state is left alone.

    Args:
        dataset: gives items, or errors in their place.
        batches: indices into `dataset`, a list a batch.
        collate: makes an item, or an error, of what the dataset gave for a batch.
        num_workers: processes that load ahead; 0 loads in this one.
        pin_memory: whether the tensors are to be in page-locked memory.

    Raises:
        Exception: from the iterator: whatever error `collate` has returned. A worker's own would bury its message.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=cast("Sampler[list[int]]", batches),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
        multiprocessing_context=TellingContext() if num_workers else None,
        generator=torch.Generator(),  # or the DataLoader would draw from the process's own
    )
    return _raise_failures(iter(loader))


def _raise_failures(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Exception):
            del items  # the error's traceback keeps this frame, and would keep the workers with it
            raise item
        yield item


def _init_worker(_worker_id: int) -> None:
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)
    end_with_parent()
    # The terminal, schedulers and the deepspeed launcher signal workers too, but the main process still needs them
    # until it has saved; it ends them itself.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_if_main_exits)


def _end_if_main_exits(_signal_number: int, _frame: FrameType | None) -> None:
    if _main_exits.value:
        os._exit(0)


@atexit.register
def _let_workers_end() -> None:
    """Runs before multiprocessing's own exit function, which sends SIGTERM to every worker left and waits."""
    _main_exits.value = 1
