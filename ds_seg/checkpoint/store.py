"""Where checkpoints lie in a work dir, and which one a user means.

Names of folders begin with a dot while they are no checkpoint yet, or none any more; a rename is what changes that.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.errors import CheckpointError, WeightsError
from ds_seg.files import sync_folder, write_text_atomic
from ds_seg.models.weight_files import is_weight_path

BACKBONE_TAG = "backbone"
"""Folder of DeepSpeed's files, where the backbone was trained."""
FROZEN_BACKBONE_FILE = "backbone.safetensors"
"""The whole backbone, where it was not."""
HEADS_FILE = "heads.pt"
LATEST, BEST = "latest", "best"
"""Text files beside the checkpoints: the name of the last one saved, and of the one with the best score."""
_NAME = re.compile(r"\.?step_(\d+)(?:\.replaced)?")


def checkpoints_folder(work_dir: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return work_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The tag of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The number of optimizer steps that a checkpoint's name tells."""
    match = _NAME.fullmatch(folder.name)
    assert match, f"{folder} is not named as a checkpoint"
    return int(match[1])


def temporary_folder(final: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return final.with_name(f".{final.name}.tmp")


def list_folders(work_dir: Path) -> list[Path]:
    """All folders that are checkpoints by name, whole or damaged, oldest step first.

    One that was about to be replaced still counts where a crash came before its successor had the name.
    """
    folder = checkpoints_folder(work_dir)
    named = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _NAME.fullmatch(path.name)]
    by_step = {checkpoint_step(path): path for path in sorted(named)}  # a name without a dot comes last and wins
    return [by_step[step] for step in sorted(by_step)]


def list_checkpoints(work_dir: Path, last_step: int | None = None) -> list[Path]:
    """All complete checkpoints of a work dir, or those up to a step, oldest step first.

    A folder gets its final name by a rename after everything in it is on the disk, so the name is enough.
    """
    complete = [path for path in list_folders(work_dir) if (path / MANIFEST).is_file()]
    return [path for path in complete if last_step is None or checkpoint_step(path) <= last_step]


def is_own(work_dir: Path, folder: Path) -> bool:
    """Whether a checkpoint, under whatever name, lies among those of a work dir and not of another one."""
    return folder.resolve().parent == checkpoints_folder(work_dir).resolve()


def find_checkpoint(work_dir: Path, tag: str) -> Path:
    """The checkpoint that `--resume TAG` means: a name in the work dir, `latest`, `best`, or a path.

    Returns:
        Its absolute path, which tells its name and its work dir also where TAG is `.` or a bare name.

    Raises:
        CheckpointError: TAG names no complete checkpoint.
    """
    for path in (checkpoints_folder(work_dir) / tag, Path(tag)):
        candidate = _follow(path.absolute())
        if (candidate / MANIFEST).is_file():
            return candidate
    names = ", ".join(path.name for path in list_checkpoints(work_dir)) or "none"
    raise CheckpointError(
        f"--resume {tag}: no complete checkpoint of that name in {checkpoints_folder(work_dir)}. "
        f"Complete ones: {names}. Use one of them, or --resume auto."
    )


def resolve_checkpoint(given: str) -> Path:
    """The checkpoint folder that a CHECKPOINT argument names: itself, or the newest of a work dir.

    Raises:
        CheckpointError: there is none, or the newest is not complete.
    """
    path = _follow(Path(given))
    if (path / MANIFEST).is_file():
        return path
    for work_dir in (path, path.parent):
        complete = list_checkpoints(work_dir) if path.exists() else []
        if complete and path in (work_dir, checkpoints_folder(work_dir)):
            newest = list_folders(work_dir)[-1]
            if newest != complete[-1]:
                raise CheckpointError(
                    f"CHECKPOINT '{given}': the newest one there, {newest.name}, is damaged: {MANIFEST} is missing. "
                    f"Name an older one, such as {complete[-1]}."
                )
            return newest
    state = "does not exist" if not path.exists() else "holds no complete checkpoint"
    raise CheckpointError(
        f"CHECKPOINT '{given}' {state}. Name a folder like WORK_DIR/checkpoints/step_000100, or a work dir with one."
    )


def resolve_weights(given: str) -> Path:
    """The weight file, HuggingFace folder or ds_seg checkpoint that CHECKPOINT or --load-from names.

    Raises:
        CheckpointError: it is neither a weight file nor a checkpoint, nor a work dir that holds one.
        WeightsError: it is an address.
    """
    if "://" in given:
        raise WeightsError(
            f"'{given}' is an address, and nothing is downloaded. Name a file on this machine; if model.pretrained has "
            "it from _base_, write model=dict(pretrained=None) and name the weights in load_from."
        )
    path = _follow(Path(given))
    return path if is_weight_path(path) and not list_checkpoints(path) else resolve_checkpoint(given)


def _follow(path: Path) -> Path:
    """What `latest` or `best` names, if `path` is one of them; and the folder that a crash left without its name.

    Raises:
        CheckpointError: it names nothing that is there.
    """
    pointer = path if path.name in (LATEST, BEST) and path.is_file() else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer else path.name
    if pointer and _NAME.fullmatch(name):
        path = path.with_name(name)
    if _replaced(path).exists() and not path.exists():
        return _replaced(path)
    if pointer and not path.is_dir():
        raise CheckpointError(
            f"{pointer} names the checkpoint {name!r}, which is not there. Name another one, or use --resume auto."
        )
    return path


def _replaced(folder: Path) -> Path:
    """Where a checkpoint is while its successor takes over its name."""
    return folder.parent / f".{folder.name}.replaced"


def publish(temporary: Path, final: Path, best: str | None) -> None:
    """Give a finished checkpoint its name; one that has the name already goes only after that.

    Args:
        temporary: everything in it is on the disk.
        final: what it is to be called.
        best: name of the checkpoint with the best score, None where there is none.
    """
    replaced = _replaced(final)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    write_text_atomic(final.with_name(LATEST), f"{final.name}\n")
    if best is not None:
        write_text_atomic(final.with_name(BEST), f"{best}\n")


def drop_old_checkpoints(
    work_dir: Path, keep: int, every_steps: int | None, needed: Collection[str | None], good_step: int
) -> None:
    """Remove old checkpoints.

    Args:
        work_dir: of the run.
        keep: how many of the newest stay; -1 for all.
        every_steps: those at multiples of it stay too.
        needed: names of others that stay.
        good_step: the newest one up to this step stays, to go back to.
    """
    folders = list_checkpoints(work_dir)
    good = [path.name for path in folders if checkpoint_step(path) <= good_step][-1:]
    for path in folders[:-keep] if keep > 0 else []:
        if path.name in (*needed, *good) or (every_steps and checkpoint_step(path) % every_steps == 0):
            continue
        _drop(path)


def drop_checkpoints_after(work_dir: Path, step: int, best: str | None) -> None:
    """Remove the checkpoints after that of `step`, from now on the latest; `best` names the best that stays."""
    folder = checkpoints_folder(work_dir)
    write_text_atomic(folder / LATEST, f"{checkpoint_name(step)}\n")
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_text_atomic(folder / BEST, f"{best}\n")
    for path in list_folders(work_dir):
        if checkpoint_step(path) > step:
            _drop(path)


def _drop(path: Path) -> None:
    dropped = path.with_name(f".{path.name}.dropped")
    path.rename(dropped)
    shutil.rmtree(dropped)


def drop_leftovers(work_dir: Path) -> None:
    """Remove what a save that was killed has left behind, and give back a name that it had taken away."""
    folder = checkpoints_folder(work_dir)
    for replaced in folder.glob(".step_*.replaced"):
        final = replaced.with_name(checkpoint_name(checkpoint_step(replaced)))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for pattern in (".step_*.tmp", ".step_*.dropped"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
