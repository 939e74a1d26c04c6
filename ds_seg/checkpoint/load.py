"""Bring a checkpoint back: everything for a resume, or only the weights."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint.manifest import verify_files
from ds_seg.checkpoint.save import BACKBONE_TAG, FROZEN_BACKBONE_FILE, HEADS_FILE
from ds_seg.checkpoint.training_state import TrainingState, read_state, validate_same_model, validate_same_run
from ds_seg.config import RunConfig
from ds_seg.engine.engines import Engines
from ds_seg.models.heads import SegmentationHeads
from ds_seg.models.load_weights import load_backbone_weights


def resume_training(folder: Path, engines: Engines, run: RunConfig) -> TrainingState:
    """Load weights and optimizers of both engines; a collective over all ranks.

    Nothing is loaded before every rank has verified its share of the files.

    Returns:
        Where the run stood.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or of another kind of run.
    """

    def check() -> dict:
        content = read_state(folder)
        validate_same_model(folder, content, engines.backbone.module, engines.heads)
        validate_same_run(folder, content, run, engines)
        return content

    _verify(folder)
    content = distributed.agree(check)
    if engines.trainable_backbone:
        loaded, _ = engines.backbone.load_checkpoint(str(folder), tag=BACKBONE_TAG, load_lr_scheduler_states=False)
        assert loaded is not None, (
            f"DeepSpeed found no backbone in {folder / BACKBONE_TAG} although its files are there"
        )
    parts = torch.load(folder / HEADS_FILE, map_location=engines.device, weights_only=True)
    engines.heads.load_state_dict(parts["heads"])
    engines.head_optimizer.load_state_dict(parts["optimizer"])
    return TrainingState(**content["state"])


def load_weights_from_checkpoint(folder: Path, backbone: nn.Module, heads: SegmentationHeads) -> None:
    """Load only the weights, of a checkpoint of any world size; a collective over all ranks.

    Global rank 0 reads the shards and hands the backbone out parameter by parameter.

    Args:
        folder: a checkpoint.
        backbone: as built, not yet wrapped by DeepSpeed; partitioned or not.
        heads: the heads, on any device.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """

    def check() -> dict:
        content = read_state(folder)
        validate_same_model(folder, content, backbone, heads)
        return content

    _verify(folder)
    content = distributed.agree(check)
    if content["backbone_trained"]:
        _load_shards(folder, backbone)
    else:
        load_backbone_weights(backbone, folder / FROZEN_BACKBONE_FILE, log=lambda _report: None)
    parts = torch.load(folder / HEADS_FILE, map_location="cpu", weights_only=True)
    heads.load_state_dict(parts["heads"])


def _verify(folder: Path) -> None:
    """Every rank reads its share, and none parses a file before all of them are known to be whole."""
    distributed.agree(lambda: verify_files(folder, distributed.rank(), distributed.world_size()))


@torch.no_grad()
def _load_shards(folder: Path, backbone: nn.Module) -> None:
    state = {}
    if distributed.is_main():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=BACKBONE_TAG)
    for name, parameter in backbone.named_parameters():
        with GatheredParameters([parameter], modifier_rank=0):
            if distributed.is_main():
                parameter.data.copy_(state[name])
