"""Averages of the weights in a checkpoint: the backbone's in one file a rank, the heads' beside the heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ds_seg import distributed
from ds_seg.errors import CheckpointError

if TYPE_CHECKING:
    from ds_seg.engine.ema import WeightAverages

EMA_FOLDER = "ema"


def averages_file() -> str:
    """Where a checkpoint holds this rank's part of each average of the backbone."""
    return f"{EMA_FOLDER}/rank_{distributed.rank():05d}.safetensors"


def validate_backbone_averages(folder: Path, ema: WeightAverages) -> None:
    """Compare what this rank would load with what the run averages.

    Raises:
        CheckpointError: they are averages of other parameters.
    """
    with safe_open(folder / averages_file(), "pt") as file:
        got = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    wanted = {name: list(average.shape) for name, average in ema.backbone.items()}
    if got != wanted:
        name = next(name for name in [*wanted, *got] if got.get(name) != wanted.get(name))
        raise CheckpointError(
            f"Checkpoint {folder} can't be resumed exactly by this run: it holds averages of {len(got)} backbone "
            f"parameters, and this run trains {len(wanted)}; '{name}' is in only one of them, or of another size. "
            "Freeze the same parts as there, or start a new run from its weights with --load-from."
        )


def load_averages(folder: Path, ema: WeightAverages, heads: Mapping[str, torch.Tensor]) -> None:
    """Bring back this rank's averages of the backbone, and those of the heads as `heads` has them."""
    ema.load(load_file(folder / averages_file()), heads)


class SavedBackboneAverages:
    """The averages in a checkpoint of any world size, put together one at a time.

    Args:
        folder: a checkpoint; one without averages of the backbone has no names.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted((folder / EMA_FOLDER).glob("rank_*.safetensors"))]
        self.names = set(self._files[0].keys()) if self._files else set()

    def read(self, name: str) -> torch.Tensor:
        """One whole average, flat and in FP32."""
        return torch.cat([file.get_tensor(name) for file in self._files])
