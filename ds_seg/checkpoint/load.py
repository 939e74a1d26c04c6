"""Bring a checkpoint back: everything for a resume, or only the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint.averages import SavedBackboneAverages
from ds_seg.checkpoint.resharding import load_backbone
from ds_seg.checkpoint.resume_point import verify_checkpoint
from ds_seg.checkpoint.saved_weights import SavedBackbone, read_saved_heads
from ds_seg.checkpoint.shards import SavedShards
from ds_seg.checkpoint.store import HEADS_FILE
from ds_seg.checkpoint.training_state import (
    TrainingState,
    read_state,
    validate_same_model,
    validate_same_rates,
    validate_same_run,
)
from ds_seg.config import RunConfig
from ds_seg.engine.adamw import RATE_GROUPS
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.precision import validate_precision
from ds_seg.models.heads import SegmentationHeads
from ds_seg.models.weight_files import describe_tensors
from ds_seg.models.weight_segmentor import plan_heads
from ds_seg.models.weight_stream import Stretch


def resume_training(
    folder: Path, engines: Engines, run: RunConfig, ema: WeightAverages | None = None, *, verified: bool = False
) -> TrainingState:
    """Load weights, averages and optimizers of both engines; a collective over all ranks.

    The checkpoint may be of another number of ranks. Nothing is loaded before every rank has verified its share of the
    files; `verified` where that has been done.

    Returns:
        Where the run stood.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or of another kind of run.
        PrecisionError: a tensor of the engines has another dtype than promised.
    """
    if not verified:
        verify_checkpoint(folder)
    saved = distributed.agree(lambda: _open_for_resume(folder, engines, run, averaged=ema is not None))
    if saved.shards is not None:
        load_backbone(saved.shards, engines)
    else:
        _hand_out(saved.frozen, engines.backbone.module)
    engines.heads.load_state_dict(saved.parts["heads"])
    engines.head_optimizer.load_state_dict(saved.parts["optimizer"])
    if ema is not None:
        ema.load(saved.averages.read, saved.parts["averages"])
    validate_precision(engines)
    return TrainingState(**saved.content["state"])


class LoadedWeights(NamedTuple):
    """What `load_weights_from_checkpoint` has found."""

    averaged: bool
    """Whether averages were loaded."""
    left_initial: list[str]
    """Why heads keep initial values; empty where none does."""


def load_weights_from_checkpoint(
    folder: Path, backbone: nn.Module, heads: SegmentationHeads, *, needs_heads: bool = True
) -> LoadedWeights:
    """Load only the weights, of a checkpoint of any world size; a collective over all ranks.

    Where the checkpoint holds averages of weights, it is they that are loaded. Global rank 0 reads the shards and
    hands the backbone out parameter by parameter.

    Args:
        folder: a checkpoint.
        backbone: as built, not yet wrapped by DeepSpeed; partitioned or not.
        heads: the heads, on any device.
        needs_heads: whether they must be the checkpoint's. Else what doesn't fit keeps its initial values, as with a
            weight file.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """

    def check() -> dict:
        content = read_state(folder)
        validate_same_model(folder, content, backbone, heads, needs_heads=needs_heads)
        return content

    verify_checkpoint(folder)
    content = distributed.agree(check)
    saved = distributed.agree(lambda: SavedBackbone(folder, content) if distributed.is_main() else None)
    _hand_out(saved, backbone)
    saved_heads = read_saved_heads(folder)
    plan = plan_heads(heads, {name: name for name in saved_heads}, describe_tensors(folder / HEADS_FILE, saved_heads))
    heads.load_state_dict({**heads.state_dict(), **{name: saved_heads[name] for name in plan.sources}})
    return LoadedWeights(content["averaged"], plan.list_left_initial())


def stream_saved_values(folder: Path, backbone: nn.Module) -> Iterator[Stretch]:
    """The trained weights that `load_weights_from_checkpoint` has loaded, in FP32; a collective at each step.

    Args:
        folder: the same checkpoint.
        backbone: the same backbone, partitioned.
    """
    saved = SavedBackbone(folder, read_state(folder)) if distributed.is_main() else None
    trained = ((name, parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad)
    for name, parameter in trained:
        values = torch.empty(parameter.ds_numel, dtype=torch.float32, device=distributed.device())
        if saved is not None:
            values.copy_(saved.read(name).flatten())
        distributed.broadcast(values)
        yield Stretch(name, 0, values)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that fits a run, with nothing of the backbone read yet."""

    content: dict[str, Any]
    parts: dict[str, Any]
    """Heads, their optimizer and their averages."""
    shards: SavedShards | None
    """Of a backbone that trains."""
    frozen: SavedBackbone | None
    """One that does not, on global rank 0."""
    averages: SavedBackboneAverages


def _open_for_resume(folder: Path, engines: Engines, run: RunConfig, *, averaged: bool) -> _Opened:
    content = read_state(folder)
    validate_same_model(folder, content, engines.backbone.module, engines.heads)
    validate_same_run(folder, content, run, engines, averaged=averaged)
    parts = torch.load(folder / HEADS_FILE, map_location=engines.device, weights_only=True)
    shards = SavedShards(folder) if engines.trainable_backbone else None
    frozen = SavedBackbone(folder, content) if shards is None and distributed.is_main() else None
    rates = [*(shards.groups[0][RATE_GROUPS] if shards else ()), *parts["optimizer"]["param_groups"]]
    validate_same_rates(folder, rates, engines.param_groups)
    return _Opened(content, parts, shards, frozen, SavedBackboneAverages(folder))


@torch.no_grad()
def _hand_out(saved: SavedBackbone | None, backbone: nn.Module) -> None:
    """Rank 0 reads; every rank's shards get their parts, one parameter at a time."""
    for name, parameter in backbone.named_parameters():
        with GatheredParameters([parameter], modifier_rank=0):
            if saved is not None:
                parameter.data.copy_(saved.read(name))
