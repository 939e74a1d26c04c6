"""Checkpoints that are either complete and verified or not there at all."""

from ds_seg.checkpoint.load import load_weights_from_checkpoint, resume_training
from ds_seg.checkpoint.save import save_checkpoint
from ds_seg.checkpoint.store import checkpoint_name, find_resume_point, list_checkpoints, resolve_checkpoint
from ds_seg.checkpoint.training_state import TrainingState

__all__ = [
    "TrainingState",
    "checkpoint_name",
    "find_resume_point",
    "list_checkpoints",
    "load_weights_from_checkpoint",
    "resolve_checkpoint",
    "resume_training",
    "save_checkpoint",
]
