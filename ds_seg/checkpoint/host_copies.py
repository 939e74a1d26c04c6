"""Copies of what is to be saved, in host memory: what the background writes while training moves the originals."""

from __future__ import annotations

import copy
import platform
from collections import Counter
from collections.abc import Mapping

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, UntypedStorage, nn

from ds_seg import distributed
from ds_seg.checkpoint.contents import find_storages, find_tensors
from ds_seg.checkpoint.write import FileContent
from ds_seg.host_memory import measure_free_bytes


def find_lack_of_memory(files: Mapping[str, FileContent]) -> str | None:
    """What keeps the hosts from holding copies of all their ranks' files, in words; a collective over all ranks."""
    copied = sum(_count_copied_bytes(storage) for file in files.values() for storage in find_storages(file))
    own = (platform.node(), copied, measure_free_bytes())
    needed: Counter[str] = Counter()
    free: dict[str, int] = {}
    for node, needed_bytes, free_bytes in distributed.gather_objects(own):
        needed[node] += needed_bytes
        free[node] = min(free_bytes, free.get(node, free_bytes))
    lacking = max(needed, key=lambda node: needed[node] - free[node])
    if needed[lacking] <= free[lacking]:
        return None
    gib = [f"{size_bytes / 2**30:.3g} GiB" for size_bytes in (free[lacking], needed[lacking])]
    return f"host {lacking} has {gib[0]} of memory free, and they take {gib[1]}"


class HostCopies:
    """Copies the files of one checkpoint after the other into the same memory.

    Tensors that share a storage share one in the copy too, and each has its place in it: torch.save then writes the
    same bytes of either. The memory is kept, page-locked where the originals are on a GPU, because touching new pages
    takes longer than the copy.

    Attributes:
        used: whether `copy` was called, which all ranks do alike, though not all have something to copy.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], UntypedStorage] = {}
        self._before = self._memory
        self.used = False

    @torch.no_grad()
    def copy(self, files: Mapping[str, FileContent]) -> dict[str, FileContent]:
        """Copy the tensors and everything around them; the copies of the call before are overwritten."""
        self.used = True
        self._before, self._memory = self._memory, {}
        copied = {name: self._copy_file(name, content) for name, content in files.items()}
        self._before = {}  # what this call has no use for, such as a frozen backbone, which is written once
        get_accelerator().synchronize()
        return copied

    def _copy_file(self, name: str, content: FileContent) -> FileContent:
        storages: dict[int, UntypedStorage] = {}
        copies: dict[int, Tensor] = {}  # id of a tensor -> its copy, which is where deepcopy looks first
        tensors = find_tensors(content)  # held, so that no other object gets the id of one
        for tensor in tensors:
            source = tensor.untyped_storage()
            if source._cdata not in storages:
                storages[source._cdata] = self._copy_storage((name, len(storages)), source)
            copies[id(tensor)] = _view_as(tensor, storages[source._cdata])
        return copy.deepcopy(content, copies)

    def _copy_storage(self, key: tuple[str, int], source: UntypedStorage) -> UntypedStorage:
        kept = self._before.get(key)
        if kept is None or kept.nbytes() != source.nbytes():
            pinned = source.device.type == "cuda"
            kept = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self._memory[key] = kept
        kept.copy_(source, non_blocking=True)
        return kept


def _count_copied_bytes(source: UntypedStorage) -> int:
    """Memory that a copy takes: torch page-locks it in powers of two."""
    return 1 << (source.nbytes() - 1).bit_length() if source.device.type == "cuda" else source.nbytes()


def _view_as(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """The tensor that `tensor` would be if its memory were `storage`."""
    view = torch.empty(0, dtype=tensor.dtype)
    view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]
    if isinstance(tensor, nn.Parameter):
        view = nn.Parameter(view, requires_grad=tensor.requires_grad)
    view.requires_grad_(tensor.requires_grad)
    view.__dict__.update(tensor.__dict__)
    return view
