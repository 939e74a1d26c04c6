"""The weights in a checkpoint of any world size, read without DeepSpeed and one parameter at a time.

DeepSpeed's files are mapped into memory, and only what is asked for is touched: neither the optimizer's state nor the
whole model is ever held.

Source: the layout of the shards is that of deepspeed/utils/zero_to_fp32.py (DeepSpeed 0.19.8). What differs: nothing
but tensors, plain values and two stand-ins is unpickled.
"""

from __future__ import annotations

import itertools
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ds_seg.checkpoint.averages import SavedBackboneAverages
from ds_seg.checkpoint.store import BACKBONE_TAG, FROZEN_BACKBONE_FILE, HEADS_FILE
from ds_seg.errors import CheckpointError

_RANK = re.compile(r"zero_pp_rank_(\d+)_")


class _ZeroStage(IntEnum):
    """Stands for DeepSpeed's enum of the same values."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class _LossScaler:
    """Stands for DeepSpeed's loss scaler, whose state is of no use here."""


_STAND_INS = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
]


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
        self._shards = _Shards(folder / BACKBONE_TAG) if content["backbone_trained"] else None

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


class _Shards:
    """DeepSpeed's ZeRO-3 files: each rank holds an equal part of each parameter, the last one padded.

    A rank's masters lie behind one another, in a few flat tensors; parameters without an optimizer are kept apart.
    """

    def __init__(self, folder: Path) -> None:
        models = [_load(path) for path in _list_ranks(folder, "model_states")]
        optimizers = [_load(path)["optimizer_state_dict"] for path in _list_ranks(folder, "optim_states")]
        try:
            self._frozen = [dict(model["frozen_param_fragments"]) for model in models]
            self._flat: list[Sequence[Tensor]] = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
            shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
        except (IndexError, KeyError, TypeError) as error:
            raise _unknown_layout(folder, error) from error
        self._parts: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.ceil(math.prod(shape) / len(self._flat))
            self._parts[name] = (start, stop)
            start = stop
        held = sum(flat.numel() for flat in self._flat[0])
        if held != start or len(models) != len(optimizers):
            fault = f"{len(models)} ranks, {len(optimizers)} optimizers, {held} of {start} masters a rank"
            raise _unknown_layout(folder, fault)
        self._numel = {name: math.prod(shape) for name, shape in shapes.items()}
        self._numel |= {name: math.prod(shape) for name, shape in models[0]["frozen_param_shapes"].items()}

    def read(self, name: str) -> Tensor:
        """One parameter, flat."""
        if name in self._parts:
            parts = [piece for flat in self._flat for piece in _cut(flat, *self._parts[name])]
        else:
            parts = [fragments[name] for fragments in self._frozen]
        return torch.cat(parts)[: self._numel[name]]


def _cut(flat: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements start..stop - 1 of tensors that lie behind one another."""
    ends = list(itertools.accumulate(tensor.numel() for tensor in flat))
    return [
        tensor[max(start - end + tensor.numel(), 0) : stop - end + tensor.numel()]
        for tensor, end in zip(flat, ends, strict=True)
        if start < end and stop > end - tensor.numel()
    ]


def _list_ranks(folder: Path, kind: str) -> list[Path]:
    ranks = {int(match[1]): path for path in folder.glob(f"*_{kind}.pt") if (match := _RANK.search(path.name))}
    return [ranks[rank] for rank in sorted(ranks)]


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise _unknown_layout(path, str(error).partition("\n")[0]) from error


def _unknown_layout(path: Path, fault: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is not laid out as DeepSpeed 0.19.8 lays out ZeRO-3 checkpoints ({fault}). Install the versions that "
        "environment.json in the work dir names, and read the checkpoint with them."
    )
