"""Checkpoints that are either complete and verified or not there at all.

What works on engines needs DeepSpeed, and is imported when it is first asked for: an export reads checkpoints without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_seg.checkpoint.resume_point import choose_resume_point
from ds_seg.checkpoint.sizes import checkpoint_bytes
from ds_seg.checkpoint.store import (
    checkpoint_name,
    list_checkpoints,
    resolve_checkpoint,
    resolve_weights,
)
from ds_seg.checkpoint.training_state import TrainingState

if TYPE_CHECKING:
    from ds_seg.checkpoint.load import load_weights_from_checkpoint, resume_training, stream_saved_values
    from ds_seg.checkpoint.save import CheckpointSaver, save_checkpoint

__all__ = [
    "CheckpointSaver",
    "TrainingState",
    "checkpoint_bytes",
    "checkpoint_name",
    "choose_resume_point",
    "list_checkpoints",
    "load_weights_from_checkpoint",
    "resolve_checkpoint",
    "resolve_weights",
    "resume_training",
    "save_checkpoint",
    "stream_saved_values",
]
_NEED_DEEPSPEED = {
    "CheckpointSaver": "save",
    "load_weights_from_checkpoint": "load",
    "resume_training": "load",
    "save_checkpoint": "save",
    "stream_saved_values": "load",
}


def __getattr__(name: str) -> Any:
    """What needs DeepSpeed, imported now."""
    if name not in _NEED_DEEPSPEED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_DEEPSPEED[name]}"), name)
