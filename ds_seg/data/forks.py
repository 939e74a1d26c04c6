"""Memory that forked processes don't share, so that what is written to it afterwards is not copied for their sake."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch

_OWN_MAPPING_BYTES = 2**25
"""glibc maps each allocation above this by itself, so that the mark goes when the tensor goes."""


def keep_out_of_forks(tensors: Iterable[torch.Tensor]) -> None:
    """Mark the memory of large tensors on the host, so that loading workers, which never read them, do not get it.

    Workers are forked, and hold on to every page as it was then: of an optimizer in host memory, the next step would
    write a second copy.

    Args:
        tensors: of any device and size; only large ones on the host are marked, once or again.
    """
    advise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() <= _OWN_MAPPING_BYTES:
            continue
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
        whole_pages = (last - first) * mmap.PAGESIZE
        # where the kernel refuses, as it may for page-locked memory, the worst is the copy
        advise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(whole_pages), mmap.MADV_DONTFORK)
