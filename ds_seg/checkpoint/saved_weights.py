"""The weights in a checkpoint of any world size, read without DeepSpeed and one parameter at a time.

Neither the optimizer's state nor the whole model is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ds_seg.checkpoint.averages import SavedBackboneAverages
from ds_seg.checkpoint.shards import SavedShards
from ds_seg.checkpoint.store import FROZEN_BACKBONE_FILE, HEADS_FILE


class SavedBackbone:
    """The backbone in a checkpoint.

    Args:
        folder: a checkpoint whose files are known to be whole.
        content: of its state file.

    Attributes:
        shapes: full shape of every parameter.

    Raises:
        CheckpointError: DeepSpeed's files have another layout than the one known here.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in content["model"]["backbone"].items()}
        self._averages = SavedBackboneAverages(folder)
        self._frozen_file = None if content["backbone_trained"] else safe_open(folder / FROZEN_BACKBONE_FILE, "pt")
        self._shards = SavedShards(folder) if content["backbone_trained"] else None

    def read(self, name: str) -> Tensor:
        """One whole parameter: its average where there is one, else its FP32 master, else what was never trained."""
        if name in self._averages.names:
            value = self._averages.read(name)
        elif self._shards is not None:
            value = self._shards.read(name)
        else:
            assert self._frozen_file is not None
            value = self._frozen_file.get_tensor(name)
        return value.view(self.shapes[name])


def read_saved_heads(folder: Path) -> dict[str, Tensor]:
    """The state of the heads in a checkpoint; averages where it has them."""
    parts = torch.load(folder / HEADS_FILE, map_location="cpu", weights_only=True, mmap=True)
    return parts["heads"] | parts.get("averages", {})
