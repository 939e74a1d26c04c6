"""Choose the checkpoint that a run goes on from: the newest one that is whole on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds_seg import distributed
from ds_seg.checkpoint.manifest import verify_files
from ds_seg.checkpoint.store import checkpoints_folder, find_checkpoint, list_folders
from ds_seg.errors import CheckpointError


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest, each rank its share; a collective over all ranks.

    Nothing is parsed but the manifest, so nothing can be loaded of a checkpoint that one rank finds damaged.

    Raises:
        CheckpointError: the same on all ranks: which files are damaged, and how.
    """
    distributed.agree(lambda: verify_files(folder, distributed.rank(), distributed.world_size()))


def choose_resume_point(work_dir: Path, resume: str, warn: Callable[[str], object]) -> Path | None:
    """The verified checkpoint that `--resume auto|TAG` means; a collective over all ranks.

    Args:
        work_dir: of the run.
        resume: `auto`, or what `find_checkpoint` takes.
        warn: gets a line for each damaged checkpoint that `auto` passes over.

    Returns:
        None where `auto` finds no checkpoint at all, so that the run starts anew.

    Raises:
        CheckpointError: TAG names none or a damaged one, or `auto` finds damaged ones only.
    """
    if resume != "auto":
        folder = distributed.agree_on_main(lambda: find_checkpoint(work_dir, resume))
        verify_checkpoint(folder)
        return folder
    folders = distributed.broadcast_object(list_folders(work_dir) if distributed.is_main() else [])
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f"--resume auto passes over a damaged checkpoint. {error}")
            continue
        return folder
    if folders:
        raise CheckpointError(
            f"--resume auto: none of the {len(folders)} checkpoints in {checkpoints_folder(work_dir)} is complete; "
            "the warnings above say what is wrong with each. Start over without --resume, from weights with "
            "--load-from."
        )
    return None
