"""How workers hand over what they have loaded, and what is said where the shared memory has no room for it."""

from __future__ import annotations

import os
import shutil
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from pathlib import Path

from ds_seg.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")


class _TellingQueue(Queue):
    """torch puts pairs of a batch's number and the batch, whose tensors pass through shared memory."""

    def _on_queue_feeder_error(self, error: Exception, item: tuple[int, object]) -> None:
        for left in _SHARED_MEMORY.glob(f"torch_{os.getpid()}_*"):  # torch 2.13 does not remove what it can't fill
            left.unlink(missing_ok=True)
        self.put((item[0], UserError(_describe_handover(error))))


class TellingContext(ForkContext):
    """Workers whose queues hand over an error in place of what they can't: Python's leave the receiver waiting."""

    def Queue(self, maxsize: int = 0) -> Queue:
        """A queue between processes."""
        return _TellingQueue(maxsize, ctx=self.get_context())


def _describe_handover(error: Exception) -> str:
    try:
        room = shutil.disk_usage(_SHARED_MEMORY)
        free = f"{room.free / 2**20:.0f} of {room.total / 2**20:.0f} MiB are free there"
    except OSError as missing:
        free = str(missing)
    return (
        f"A data worker can't hand over what it has loaded through {_SHARED_MEMORY} ({free}): {error}. Enlarge it "
        "(docker run --shm-size=16g, or --ipc=host), or load without workers: --cfg-options data.workers_per_gpu=0. "
        "Training goes on with --resume auto."
    )
