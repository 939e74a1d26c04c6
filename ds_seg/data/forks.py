"""Memory that forked processes don't share, so that what is written to it afterwards is not copied for their sake."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterable

import torch

_advise = ctypes.CDLL(None).madvise
_LARGE_BYTES = 2**25
"""A mark splits the process's map of its memory, which the kernel keeps short."""


def keep_out_of_forks(tensors: Iterable[torch.Tensor]) -> None:
    """Mark the memory of large tensors on the host, so that loading workers, which never read them, do not get it.

    Workers are forked, and hold on to every page as it was then: of an optimizer in host memory, the next step would
    write a second copy. A mark ends with its tensor's memory, which the allocator may use again for something else.

    Args:
        tensors: of any device and size; only large ones on the host are marked, once or again.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.nbytes() <= _LARGE_BYTES:
            continue
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        pages = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE)
        # where the kernel refuses, as it may for page-locked memory, the worst is the copy
        _advise(*pages, mmap.MADV_DONTFORK)
        weakref.finalize(storage, _advise, *pages, mmap.MADV_DOFORK).atexit = False
