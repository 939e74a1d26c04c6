"""Checkpoints without engines: a few small files that are written and given their name as a run's are."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_seg.checkpoint.manifest import MANIFEST, Manifest, seal_files, write_manifest
from ds_seg.checkpoint.store import checkpoint_name
from ds_seg.checkpoint.write import Save, commit, leaving_nothing, prepare_folder, replace_file, write_files

STATE = "state.json"


def describe_save(work_dir: Path, step: int, **changes) -> Save:
    """A save of one process that keeps two checkpoints and has no best one."""
    values = {"best": None, "good_step": step, "keep": 2, "keep_every_steps": None, "world_size": 1}
    values |= {"config_digest": "", "versions": {}}
    return Save(work_dir, step, **{**values, **changes})


def make_files(text: str) -> dict:
    """Contents of all three kinds that are not links; the text tells checkpoints apart."""
    shard = {"masters": torch.full((64,), float(len(text))), "name": text}
    return {"backbone/shard.pt": shard, "ema/rank_00000.safetensors": {"a": torch.zeros(8)}, STATE: text}


def make_checkpoint(work_dir: Path, step: int, text: str | None = None, **changes) -> Path:
    """Save a checkpoint from its temporary folder to its name."""
    save = describe_save(work_dir, step, **changes)
    with leaving_nothing(save):
        prepare_folder(save)
        return commit(save, write_files(save, make_files(text or checkpoint_name(step)), []))


def amend_checkpoint(work_dir: Path, step: int, text: str, **changes) -> None:
    """Give a saved checkpoint another text, by links for all else."""
    save = describe_save(work_dir, step, **changes)
    with leaving_nothing(save):
        prepare_folder(save)
        replace_file(save, STATE, text)


def list_in_manifest(folder: Path) -> None:
    """Make a checkpoint of a folder: its manifest lists what is in it now."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    write_manifest(folder, Manifest(0, 1, "", {}, seal_files(folder, names)))


def read_text(folder: Path) -> str:
    """What tells a checkpoint from others."""
    return (folder / STATE).read_text()
