"""The run that a command line means, in what its checkpoint decides: the size of a step, and what it computes in."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ds_seg import distributed
from ds_seg.checkpoint.description import read_trained_dtype
from ds_seg.checkpoint.store import find_checkpoint, list_checkpoints, resolve_weights
from ds_seg.checkpoint.training_state import read_state
from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.config.batches import describe_batch
from ds_seg.errors import CheckpointError


def resolve_run(options: RunOptions) -> RunConfig:
    """The run on this number of processes; a collective over all ranks.

    A config without `global_batch` makes it grow with the processes. A run that goes on from a checkpoint keeps the
    checkpoint's, by other micro-batches, and says so in its notes.

    Raises:
        ConfigError: with every fault of the config; one is that the processes can't share the global batch.
        CheckpointError: `--resume TAG` names no complete checkpoint.
    """
    run = build_run_config(options, distributed.world_size())
    if not run.resume:
        return run
    saved = distributed.agree_on_main(lambda: _read_saved(run))
    if saved is None:
        return run
    if saved["global_batch"] != run.global_batch and run.mmseg.get("global_batch") is None:
        run = build_run_config(dataclasses.replace(options, global_batch=saved["global_batch"]), run.world_size)
    then = describe_batch(saved["global_batch"], saved["micro_batch"], saved["world_size"])
    now = describe_batch(run.global_batch, run.micro_batch, run.world_size)
    if then == now:
        return run
    note = (
        f"resuming with a global batch of {now}; the checkpoint's was {then}. Data, schedule and noise do not depend "
        "on that, but for dropout in heads; BatchNorm in heads sees one micro-batch of all processes at a time"
    )
    return dataclasses.replace(run, notes=(*run.notes, note))


def resolve_trained(options: RunOptions, checkpoint: str, *, with_engines: bool = True) -> tuple[RunConfig, Path]:
    """The run and the weights of an evaluation, prediction or export; a collective over all ranks.

    The backbone computes in what the weights were trained in, where they tell; a DeepSpeed JSON on the command line
    decides otherwise.

    Args:
        options: of the command line.
        checkpoint: see `resolve_weights`.
        with_engines: whether DeepSpeed will read its JSON.

    Raises:
        ConfigError: with every fault of the config.
        CheckpointError: there is no such checkpoint, or it is damaged.
        WeightsError: the weight file can't be read.
    """
    options = dataclasses.replace(options, training=False)
    run = build_run_config(options, distributed.world_size(), with_engines=with_engines)
    weights = distributed.agree(lambda: resolve_weights(checkpoint))
    if options.deepspeed_config is not None:
        return run, weights
    trained = distributed.agree_on_main(lambda: read_trained_dtype(weights))
    bf16 = trained == torch.bfloat16
    if trained is None or bf16 == run.bf16:
        return run, weights
    if distributed.is_main():
        print(f"the backbone computes in {str(trained).removeprefix('torch.')}, what {weights} was trained in")
    return dataclasses.replace(run, deepspeed={**run.deepspeed, "bf16": {"enabled": bf16}}), weights


def _read_saved(run: RunConfig) -> dict[str, Any] | None:
    """The state of the checkpoint to resume from; of `auto`'s, the newest that can be read (the load verifies them)."""
    tag = run.resume or ""
    candidates = list_checkpoints(run.work_dir)[::-1] if tag == "auto" else [find_checkpoint(run.work_dir, tag)]
    for folder in candidates:
        with contextlib.suppress(CheckpointError):
            return read_state(folder)
    return None
