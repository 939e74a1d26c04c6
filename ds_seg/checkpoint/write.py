"""Write the files of a checkpoint and give it its name; nothing here knows the engines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ds_seg import distributed
from ds_seg.checkpoint.manifest import FileEntry, Manifest, find_misfits, read_manifest, seal_files, write_manifest
from ds_seg.checkpoint.sizes import format_gib
from ds_seg.checkpoint.store import (
    checkpoint_name,
    checkpoints_folder,
    drop_leftovers,
    drop_old_checkpoints,
    publish,
    temporary_folder,
)
from ds_seg.errors import CheckpointError
from ds_seg.files import find_lasting

FileContent = str | Path | Mapping[str, object]
"""Text; another checkpoint's file, linked or copied; or what torch or safetensors stores, by the name's suffix."""
_OVERHEAD_BYTES = 1 << 16
"""Most that a file takes beside its tensors: the pickled names, shapes and DeepSpeed's config."""
_REMEDY = (
    "Make room there, keep fewer (checkpoint_config.max_keep_ckpts=N keeps N, and one more lies there while it is "
    "written), or choose another --work-dir; then go on with --resume auto."
)


@dataclass(frozen=True)
class Save:
    """A checkpoint that is being made, the same on all ranks.

    Attributes:
        work_dir: Of the run.
        step: Optimizer steps done.
        best: Name of the checkpoint with the best score, None where there is none.
        good_step: The last one whose loss and gradient were finite; a checkpoint from before the next one stays.
        keep: How many of the newest stay.
        keep_every_steps: Those at multiples of it stay too; None for none.
        world_size: Processes that write it.
        config_digest: Of the run's config.
        versions: Of the packages that write it.
    """

    work_dir: Path
    step: int
    best: str | None
    good_step: int
    keep: int
    keep_every_steps: int | None
    world_size: int
    config_digest: str
    versions: Mapping[str, str]

    @property
    def final(self) -> Path:
        """The folder of the checkpoint once it is complete."""
        return checkpoints_folder(self.work_dir) / checkpoint_name(self.step)

    @property
    def temporary(self) -> Path:
        """The folder until then."""
        return temporary_folder(self.final)


def prepare_folder(save: Save) -> None:
    """Make the temporary folder, after tidying up behind saves that were killed; a collective over all ranks.

    Raises:
        CheckpointError: it can't be made.
    """

    def prepare() -> None:
        drop_leftovers(save.work_dir)
        save.temporary.mkdir(parents=True)

    _on_main(save, prepare)


def validate_space(save: Save, own_bytes: int, own_files: int) -> None:
    """Compare what all ranks are about to write with what is free; a collective over all ranks.

    Args:
        save: what is being saved.
        own_bytes: of this rank's tensors.
        own_files: of this rank.

    Raises:
        CheckpointError: there is too little room; nothing was written.
    """
    needed_bytes = sum(distributed.gather_objects(own_bytes + own_files * _OVERHEAD_BYTES))

    def compare() -> None:
        free_bytes = shutil.disk_usage(save.temporary).free
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"Checkpoint {save.final} needs {format_gib(needed_bytes)}, and {format_gib(free_bytes)} are free "
                f"there. Nothing was written; older checkpoints are complete. {_REMEDY}"
            )

    _on_main(save, compare)


def list_files(folder: Path) -> list[str]:
    """Paths of all files in a folder, as seen from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_files(save: Save, files: Mapping[str, FileContent], present: Iterable[str]) -> dict[str, FileEntry]:
    """Write this rank's files, flush them to the disk and sum them up.

    Args:
        save: what is being saved.
        files: path in the folder -> content.
        present: paths of files that are there already, to be flushed and summed up too.

    Raises:
        CheckpointError: one can't be written.
    """
    with explained(save.final):
        entries = seal_files(save.temporary, present)
    for name, content in files.items():
        path = save.temporary / name
        with explained(save.final):
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):  # its checksum was taken when it was written, not of what it may be now
                _link_or_copy(content, path)
                entries[name] = read_manifest(content.parent).files[content.name]
            else:
                _write(path, content)
                entries |= seal_files(save.temporary, [name])
    return entries


def commit(save: Save, entries: Mapping[str, FileEntry]) -> Path:
    """Sum up all ranks' files, give the checkpoint its name, and remove old ones; a collective over all ranks.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk refuses something, or rank 0 does not see what the others have written.
    """
    files = {name: entry for part in distributed.gather_objects(dict(entries)) for name, entry in part.items()}

    def name_it() -> None:
        _validate_all_there(save, files)
        _publish(save, Manifest(save.step, save.world_size, save.config_digest, save.versions, files))

    _on_main(save, name_it)
    return save.final


def replace_file(save: Save, name: str, content: str) -> None:
    """Give a complete checkpoint another text in one of its files, all or nothing; a collective over all ranks.

    Args:
        save: of the same step; its temporary folder is there and empty.
        name: of the file.
        content: its new text.

    Raises:
        CheckpointError: the disk refuses something.
    """

    def link_and_write() -> None:
        manifest = read_manifest(save.final)
        for other in manifest.files:
            path = save.temporary / other
            path.parent.mkdir(exist_ok=True)
            if other != name:
                _link_or_copy(save.final / other, path)
        _write(save.temporary / name, content)
        sealed = seal_files(save.temporary, [name])
        _publish(save, replace(manifest, files={**manifest.files, **sealed}))

    _on_main(save, link_and_write)


@contextmanager
def leaving_nothing(save: Save) -> Iterator[None]:
    """Remove the temporary folder if what is done within fails on all ranks."""
    try:
        yield
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(save.temporary, ignore_errors=True)
        raise


def _on_main(save: Save, change: Callable[[], None]) -> None:
    """Let global rank 0 work on the folder; a collective over all ranks, who all get the failure.

    Raises:
        CheckpointError: what `change` raised, or the disk's refusal.
    """

    def try_to() -> None:
        if distributed.is_main():
            with explained(save.final):
                change()

    distributed.agree(try_to)


def _publish(save: Save, manifest: Manifest) -> None:
    write_manifest(save.temporary, manifest)
    publish(save.temporary, save.final, save.best)
    needed = (save.final.name, save.best)
    drop_old_checkpoints(save.work_dir, save.keep, save.keep_every_steps, needed, save.good_step)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link a file that is on the disk, or copy it there where the file system has no links (FUSE, AFS)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _validate_all_there(save: Save, files: Mapping[str, FileEntry]) -> None:
    """Look for every rank's files: where nodes don't share the work dir, each has its own alone and knows no better."""
    if misfits := find_lasting(lambda: find_misfits(save.temporary, files)):
        raise CheckpointError(
            f"Checkpoint {save.final} is not complete: rank 0 does not see {len(misfits)} of its {len(files)} files as "
            f"they were written; the first, {misfits[0]}. Every process writes its own part, into the same folder: "
            "choose a --work-dir on a file system that all nodes share. What rank 0 sees of the checkpoint is removed."
        )


def _write(path: Path, content: str | Mapping[str, object]) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".safetensors":
        save_file(dict(content), path)  # type: ignore[arg-type]
    else:
        # a path would be written by torch with the interpreter locked, and training would stand still meanwhile
        with path.open("wb") as file:
            torch.save(content, file)


@contextmanager
def explained(final: Path) -> Iterator[None]:
    """Say what failed where the disk refuses something; torch and safetensors raise errors of their own then."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(cause, RuntimeError):
            raise
        reason = str(cause).partition("\n")[0]
        raise CheckpointError(
            f"Checkpoint {final} could not be written: {type(cause).__name__}: {reason}. What was written of it is "
            f"removed; older checkpoints are complete. {_REMEDY}"
        ) from error
