"""Averages of the weights in a checkpoint: the backbone's in one file a rank, the heads' beside the heads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from ds_seg import distributed
from ds_seg.checkpoint.manifest import list_files

EMA_FOLDER = "ema"


def averages_file() -> str:
    """Where a checkpoint holds this rank's part of each average of the backbone."""
    return f"{EMA_FOLDER}/rank_{distributed.rank():05d}.safetensors"


class SavedBackboneAverages:
    """The averages in a checkpoint of any world size, any stretch of one at a time.

    Args:
        folder: a checkpoint; one without averages of the backbone has no names.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, "pt") for path in list_files(folder, EMA_FOLDER)]
        self.names = set(self._files[0].keys()) if self._files else set()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop - 1 of an average, flat and in FP32; what lies beyond its end is left out."""
        pieces, begin = [], 0
        for file in self._files:
            part = file.get_slice(name)
            end = begin + part.get_shape()[0]
            first, last = max(start, begin), end if stop is None else min(stop, end)
            if first < last:
                pieces.append(part[first - begin : last - begin])
            begin = end
        return torch.cat(pieces) if pieces else torch.empty(0)
