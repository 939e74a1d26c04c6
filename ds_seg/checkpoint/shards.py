"""DeepSpeed's ZeRO-3 files of any world size, read without DeepSpeed and any stretch of a parameter at a time.

Every file is mapped into memory when something in it is first asked for, and only what is asked for is touched. So a
rank that goes on with another rank's files holds its own part and nothing else.

Source: the layout of the shards is that of deepspeed/utils/zero_to_fp32.py (DeepSpeed 0.19.8). What differs: nothing
but tensors, plain values and two stand-ins is unpickled.
"""

from __future__ import annotations

import itertools
import math
import pickle
import re
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_seg.checkpoint.manifest import list_files
from ds_seg.checkpoint.store import BACKBONE_TAG
from ds_seg.errors import CheckpointError

MASTER = "master"
"""What `SavedShards.read` calls the FP32 value of a trained parameter, beside the keys of the optimizer's state."""

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


class SavedShards:
    """What the ranks of some run wrote: each holds an equal part of each parameter, the last ones padded.

    A rank's masters lie behind one another in a few flat tensors, and so does each moment of its optimizer; parameters
    without an optimizer are kept apart. Where one flat tensor ends and the next begins differs between world sizes.

    Args:
        checkpoint: one that is known to be whole.

    Attributes:
        numels: elements of every parameter.
        trained: elements of those that have masters.

    Raises:
        CheckpointError: DeepSpeed's files have another layout than the one known here; also when they are read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder, self._opened = checkpoint / BACKBONE_TAG, dict[Path, Any]()
        files = list_files(checkpoint, BACKBONE_TAG)
        self._models, self._optimizers = _list_ranks(files, "model_states"), _list_ranks(files, "optim_states")
        if not self._models or len(self._models) != len(self._optimizers):
            raise _unknown_layout(self._folder, f"{len(self._models)} ranks, {len(self._optimizers)} optimizers")
        try:
            shapes = {name: shape for group in self._model(0)["param_shapes"] for name, shape in group.items()}
            frozen = self._model(0)["frozen_param_shapes"].items()
        except (AttributeError, KeyError, TypeError) as error:
            raise _unknown_layout(self._folder, error) from error
        self.trained = {name: math.prod(shape) for name, shape in shapes.items()}
        self.numels = self.trained | {name: math.prod(shape) for name, shape in frozen}
        stops = list(itertools.accumulate(self._part(name) for name in self.trained))
        self._starts = dict(zip(self.trained, [0, *stops][: len(stops)], strict=True))
        self._held = stops[-1] if stops else 0

    @property
    def counters(self) -> dict[str, int]:
        """How far DeepSpeed's engine had counted: `global_steps`, `skipped_steps`, `global_samples`."""
        return {key: int(self._model(0)[key]) for key in ("global_steps", "skipped_steps", "global_samples")}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; `params` in them means nothing here."""
        return self._optimizer(0)["optimizer_state_dict"]["param_groups"]

    @property
    def optimizer_steps(self) -> int | None:
        """How often the optimizer has stepped; None where it never has and holds no moments."""
        states = self._optimizer(0)["optimizer_state_dict"]["state"]
        counts = {int(state["step"]) for state in states.values()}
        if len(counts) > 1:
            raise _unknown_layout(self._folder, f"the optimizer's parts have stepped {sorted(counts)} times")
        return counts.pop() if counts else None

    def read(self, name: str, what: str = MASTER, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start..stop - 1 of a parameter, flat, copied out of the files.

        Args:
            name: of the parameter.
            what: MASTER, or a key of the optimizer's state (`exp_avg`); one that is not trained has its value alone.
            start: first element.
            stop: one past the last; what lies beyond the parameter's end is left out.
        """
        part, stop = self._part(name), min(self.numels[name], self.numels[name] if stop is None else stop)
        pieces = []
        for rank in range(start // part, math.ceil(stop / part)):
            first, last = max(start - rank * part, 0), min(stop - rank * part, part)
            if name not in self.trained:
                pieces.append(self._model(rank)["frozen_param_fragments"][name][first:last])
            else:
                begin = self._starts[name]
                pieces += _cut(self._flat(rank, what), begin + first, begin + last)
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _part(self, name: str) -> int:
        """Elements of a parameter that each rank holds."""
        return math.ceil(self.numels[name] / len(self._models))

    def _flat(self, rank: int, what: str) -> Sequence[Tensor]:
        optimizer = self._optimizer(rank)
        if what == MASTER:
            return optimizer["fp32_flat_groups"]
        states = optimizer["optimizer_state_dict"]["state"]
        return [states[index][what] for index in sorted(states)]

    def _model(self, rank: int) -> dict[str, Any]:
        return self._open(self._models[rank])

    def _optimizer(self, rank: int) -> dict[str, Any]:
        path = self._optimizers[rank]
        try:
            state = self._open(path)["optimizer_state_dict"]
            held = sum(flat.numel() for flat in state["fp32_flat_groups"])
        except (AttributeError, KeyError, TypeError) as error:
            raise _unknown_layout(path, error) from error
        if held != self._held:
            raise _unknown_layout(path, f"{held} of {self._held} masters a rank")
        return state

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            try:
                with torch.serialization.safe_globals(_STAND_INS):
                    self._opened[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise _unknown_layout(path, str(error).partition("\n")[0]) from error
        return self._opened[path]


def _cut(flat: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements start..stop - 1 of tensors that lie behind one another."""
    ends = list(itertools.accumulate(tensor.numel() for tensor in flat))
    return [
        tensor[max(start - end + tensor.numel(), 0) : stop - end + tensor.numel()]
        for tensor, end in zip(flat, ends, strict=True)
        if start < end and stop > end - tensor.numel()
    ]


def _list_ranks(files: Sequence[Path], kind: str) -> list[Path]:
    named = [path for path in files if path.name.endswith(f"_{kind}.pt")]
    ranks = {int(match[1]): path for path in named if (match := _RANK.search(path.name))}
    return [ranks[rank] for rank in sorted(ranks)]


def _unknown_layout(path: Path, fault: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is not laid out as DeepSpeed 0.19.8 lays out ZeRO-3 checkpoints ({fault}). Install the versions that "
        "environment.json in the work dir names, and read the checkpoint with them."
    )
