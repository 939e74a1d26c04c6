"""Where checkpoints lie in a work dir, and which one a user means."""

from __future__ import annotations

import shutil
from pathlib import Path

from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.errors import CheckpointError
from ds_seg.models.weight_files import is_weight_path

BACKBONE_TAG = "backbone"
"""Folder of DeepSpeed's files, where the backbone was trained."""
FROZEN_BACKBONE_FILE = "backbone.safetensors"
"""The whole backbone, where it was not."""
HEADS_FILE = "heads.pt"


def checkpoints_folder(work_dir: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return work_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The tag of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The number of optimizer steps that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(work_dir: Path) -> list[Path]:
    """All complete checkpoints of a work dir, oldest step first.

    A folder gets its final name by a rename after everything in it is on the disk, so the name is enough.
    """
    found = (path for path in checkpoints_folder(work_dir).glob("step_*") if (path / MANIFEST).is_file())
    return sorted(found, key=checkpoint_step)


def find_resume_point(work_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume auto|TAG` means; None where `auto` finds none and the run starts anew.

    Raises:
        CheckpointError: TAG names no complete checkpoint.
    """
    complete = list_checkpoints(work_dir)
    if resume == "auto":
        return complete[-1] if complete else None
    for candidate in (checkpoints_folder(work_dir) / resume, Path(resume)):
        if (candidate / MANIFEST).is_file():
            return candidate
    names = ", ".join(path.name for path in complete) or "none"
    raise CheckpointError(
        f"--resume {resume}: no complete checkpoint of that name in {checkpoints_folder(work_dir)}. "
        f"Complete ones: {names}. Use one of them, or --resume auto."
    )


def resolve_checkpoint(given: str) -> Path:
    """The checkpoint folder that a CHECKPOINT argument names: itself, or the newest of a work dir.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(given)
    if (path / MANIFEST).is_file():
        return path
    for work_dir in (path, path.parent):
        complete = list_checkpoints(work_dir) if path.exists() else []
        if complete and path in (work_dir, checkpoints_folder(work_dir)):
            return complete[-1]
    state = "does not exist" if not path.exists() else "holds no complete checkpoint"
    raise CheckpointError(
        f"CHECKPOINT '{given}' {state}. Name a folder like WORK_DIR/checkpoints/step_000100, or a work dir with one."
    )


def resolve_weights(given: str) -> Path:
    """The weight file, HuggingFace folder or ds_seg checkpoint that CHECKPOINT or --load-from names.

    Raises:
        CheckpointError: it is neither a weight file nor a checkpoint, nor a work dir that holds one.
    """
    path = Path(given)
    return path if is_weight_path(path) and not list_checkpoints(path) else resolve_checkpoint(given)


def drop_old_checkpoints(work_dir: Path, keep: int, best: str | None, good_step: int) -> None:
    """Remove all but the newest `keep` checkpoints, the one named `best`, and the newest up to `good_step`."""
    complete = list_checkpoints(work_dir)
    good = [path for path in complete if checkpoint_step(path) <= good_step][-1:]
    for path in complete[:-keep]:
        if path.name != best and path not in good:
            _remove(path)


def drop_checkpoints_after(work_dir: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in list_checkpoints(work_dir):
        if checkpoint_step(path) > step:
            _remove(path)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink()  # first, so that a kill leaves nothing that looks complete
    shutil.rmtree(path)


def drop_leftovers(work_dir: Path) -> None:
    """Remove what saves that were killed have left behind."""
    for pattern in (".step_*.tmp", ".step_*.replaced"):
        for path in checkpoints_folder(work_dir).glob(pattern):
            shutil.rmtree(path)
