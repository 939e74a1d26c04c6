"""Save a checkpoint so that its name appears only when all of it is on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import save_file

from ds_seg import distributed
from ds_seg.checkpoint.averages import save_backbone_averages
from ds_seg.checkpoint.manifest import seal_files, sync_folder, write_manifest
from ds_seg.checkpoint.store import (
    BACKBONE_TAG,
    FROZEN_BACKBONE_FILE,
    HEADS_FILE,
    checkpoint_name,
    checkpoints_folder,
    drop_leftovers,
    drop_old_checkpoints,
    list_checkpoints,
)
from ds_seg.checkpoint.training_state import TrainingState, write_state
from ds_seg.config import RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.precision import validate_precision


def save_checkpoint(engines: Engines, run: RunConfig, state: TrainingState, ema: WeightAverages | None = None) -> Path:
    """Write both engines' weights, averages and optimizers and the run's state; a collective over all ranks.

    Everything goes to a temporary folder, is flushed and summed up in a manifest, and then renamed. Older
    checkpoints are removed after that.

    Returns:
        The folder of the checkpoint.

    Raises:
        PrecisionError: a tensor has another dtype than promised; nothing was written.
    """
    validate_precision(engines)
    name = checkpoint_name(state.step)
    final = checkpoints_folder(run.work_dir) / name
    temporary = final.with_name(f".{name}.tmp")
    if distributed.is_main():
        drop_leftovers(run.work_dir)
        temporary.mkdir(parents=True)
    distributed.barrier()
    if engines.trainable_backbone:
        engines.backbone.save_checkpoint(str(temporary), tag=BACKBONE_TAG, save_latest=False)
    else:
        _save_frozen_backbone(engines, temporary, list_checkpoints(run.work_dir))
    if ema is not None:
        save_backbone_averages(temporary, ema)
    if distributed.is_main():
        _save_heads(engines, ema, temporary)
        write_state(temporary, state, run, engines, averaged=ema is not None)
    distributed.barrier()
    sealed = distributed.gather_objects(seal_files(temporary, _own_files(temporary)))
    if distributed.is_main():
        write_manifest(temporary, {name: entry for part in sealed for name, entry in part.items()})
        _publish(temporary, final)
        good_step = state.step - state.skipped_in_a_row
        drop_old_checkpoints(run.work_dir, run.keep_checkpoints, state.best_checkpoint, good_step)
    distributed.barrier()
    return final


def _save_heads(engines: Engines, ema: WeightAverages | None, folder: Path) -> None:
    parts = {"heads": engines.heads.state_dict(), "optimizer": engines.head_optimizer.state_dict()}
    torch.save(parts | ({"averages": ema.heads} if ema is not None else {}), folder / HEADS_FILE)


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one that has the name already goes only after that."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _own_files(folder: Path) -> list[str]:
    """This rank's share of the files, so that every rank sums up about as many bytes."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return files[distributed.rank() :: distributed.world_size()]


def _save_frozen_backbone(engines: Engines, folder: Path, earlier: list[Path]) -> None:
    """A backbone that never moves is written once and linked from then on."""
    target = folder / FROZEN_BACKBONE_FILE
    linked = distributed.broadcast_object(bool(earlier) and (earlier[-1] / FROZEN_BACKBONE_FILE).is_file())
    if linked:
        if distributed.is_main():
            os.link(earlier[-1] / FROZEN_BACKBONE_FILE, target)
        return
    tensors = {}
    for name, parameter in engines.backbone.module.named_parameters():
        with GatheredParameters([parameter]):
            if distributed.is_main():
                tensors[name] = parameter.detach().cpu().clone()
    if distributed.is_main():
        save_file(tensors, target)
