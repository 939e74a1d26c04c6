"""A run's work dir: what is put there before training, and what an earlier run left there."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, choose_resume_point
from ds_seg.checkpoint.config_record import CONFIG_FILE, describe_changes, format_config, record_config
from ds_seg.checkpoint.store import (
    checkpoint_step,
    checkpoints_folder,
    drop_leftovers,
    is_own,
    list_checkpoints,
    list_folders,
)
from ds_seg.config import RunConfig
from ds_seg.errors import UserError
from ds_seg.files import validate_output_folder, write_text_atomic
from ds_seg.tracking.files import write_json_atomic
from ds_seg.versions import find_versions

T = TypeVar("T")

_PACKAGES = (
    "torch",
    "deepspeed",
    "mmcv-full",
    "mmsegmentation",
    "wandb",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
)
_OUTPUTS = ("checkpoints", "metrics.jsonl", "summary.json", "report.html", "predictions", "stacks", "wandb_run_id")
"""What tells of an earlier run."""
_DESCRIPTION = (CONFIG_FILE, "deepspeed.json", "environment.json", "loss_curve.png")
"""What goes with it, and does not tell: a run that never made a step leaves it too."""
_ASIDE = "earlier-"
"""What folders are called, with a number, that hold what was set aside."""


def find_resume_point(run: RunConfig) -> Path | None:
    """Find the whole checkpoint to resume from; a collective over all ranks.

    Returns:
        The checkpoint to resume from, or None for a run that starts anew.

    Raises:
        CheckpointError: `--resume TAG` names no whole checkpoint, or `--resume auto` finds damaged ones only.
        UserError: the work dir can't be written.
    """
    _on_main(run.work_dir, lambda: _validate_work_dir(run.work_dir))
    if not run.resume:
        return None
    _on_main(run.work_dir, lambda: drop_leftovers(run.work_dir))
    resume_from = choose_resume_point(run.work_dir, run.resume, _warn)
    if distributed.is_main():
        if resume_from is None:
            _tell_of_no_resume(run.work_dir)
        elif changes := describe_changes(resume_from, run):
            print(changes, flush=True)
    return resume_from


def _validate_work_dir(work_dir: Path) -> None:
    try:
        os.fsencode(work_dir).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--work-dir {work_dir} is not UTF-8, and torch could not load a checkpoint from there. Choose another."
        ) from error
    validate_output_folder("--work-dir", work_dir)


def open_work_dir(run: RunConfig, state: TrainingState, resume_from: Path | None) -> Path | None:
    """Make the work dir this run's, just before its first step; a collective over all ranks.

    What an earlier run left there moves to `earlier-N`: all of it or, for a run that goes on from one of the work dir's
    own checkpoints, those after it. So nothing is lost, and nothing of it can be mistaken for this run's.

    Args:
        run: whose start can't fail any more.
        state: where it stands; a best score is forgotten if its checkpoint is not in the work dir.
        resume_from: the checkpoint that it goes on from, wherever it lies; None for one that starts anew.

    Returns:
        `resume_from` if it is one of the work dir's own; else None.

    Raises:
        UserError: the work dir can't be written.
    """

    def prepare() -> tuple[Path | None, bool]:
        checkpoints = checkpoints_folder(run.work_dir)
        checkpoints.mkdir(parents=True, exist_ok=True)
        own = resume_from if resume_from and is_own(run.work_dir, resume_from) else None
        if own:
            _set_newer_checkpoints_aside(run.work_dir, state.step)
        else:
            _set_earlier_run_aside(run.work_dir)
        _write_description(run)
        return own, state.best_checkpoint is not None and (checkpoints / state.best_checkpoint).exists()

    own, best_is_there = _on_main(run.work_dir, prepare)
    if not best_is_there:
        state.best_checkpoint = state.best_score = state.best_metric = None
    return own


def _on_main(work_dir: Path, change: Callable[[], T]) -> T:
    """Let global rank 0 change the work dir; a collective over all ranks, who all get the result or the failure."""

    def try_to() -> T:
        try:
            return change()
        except OSError as error:
            raise UserError(f"Work dir {work_dir} can't be written: {error}. Choose another --work-dir.") from error

    return distributed.agree_on_main(try_to)


def _warn(text: str) -> None:
    if distributed.is_main():
        print(f"warning: {text}", flush=True)


def _tell_of_no_resume(work_dir: Path) -> None:
    """Say that `--resume auto` starts anew, and from what it could go on that was set aside."""
    aside = [folder for earlier in sorted(work_dir.glob(f"{_ASIDE}*")) for folder in list_checkpoints(earlier)]
    newest = max(aside, key=lambda folder: folder.stat().st_mtime, default=None)
    hint = f"; to go on with a run that was set aside: --resume {newest}" if newest else ""
    print(f"--resume auto: {checkpoints_folder(work_dir)} has no checkpoint, so the run starts anew{hint}", flush=True)


def _set_earlier_run_aside(work_dir: Path) -> None:
    description, outputs = (
        [path for name in names if (path := work_dir / name).exists()] for names in (_DESCRIPTION, _OUTPUTS)
    )
    if any(path.is_file() or _list_outputs(path) for path in outputs):
        hint = " (--resume auto would have gone on with it)" if list_checkpoints(work_dir) else ""
        # after a kill in the midst of it the next run moves the rest, as long as outputs tell of it
        aside = _set_aside(work_dir, [*description, *outputs])
        print(f"moved the outputs of an earlier run to {aside}{hint}")
        checkpoints_folder(work_dir).mkdir(exist_ok=True)


def _set_newer_checkpoints_aside(work_dir: Path, step: int) -> None:
    newer = [path for path in list_folders(work_dir) if checkpoint_step(path) > step]
    if newer:
        print(f"moved the checkpoints after step {step} to {_set_aside(work_dir, newer)}")


def _set_aside(work_dir: Path, paths: list[Path]) -> Path:
    number = 1
    while any((folder / _aside(number)).exists() for folder in (work_dir, *paths)):
        number += 1
    aside = work_dir / _aside(number)
    aside.mkdir()
    for path in paths:
        _move(path, aside)
    return aside


def _aside(number: int) -> str:
    return f"{_ASIDE}{number}"


def _move(path: Path, aside: Path) -> None:
    """Set one thing aside; what a link or a mount has on another disk stays there, and aside gets a link to it.

    The link or the mount itself stays as it is: it says where there is room for checkpoints.
    """
    linked = path.is_symlink() and path.is_dir()
    if not linked:
        try:
            path.rename(aside / path.name)
            return
        except OSError as error:
            linked = error.errno == errno.EBUSY  # a mount
            if not linked and error.errno != errno.EXDEV:
                raise
    kept = (path if linked else path.parent) / aside.name
    kept.mkdir(exist_ok=True)
    for entry in _list_outputs(path) if linked else [path]:
        entry.rename(kept / entry.name)
    (aside / path.name).symlink_to(os.path.relpath(kept if linked else kept / path.name, aside))


def _list_outputs(folder: Path) -> list[Path]:
    """What is there but for what was set aside."""
    return [path for path in folder.iterdir() if not path.name.startswith(_ASIDE)]


def _write_description(run: RunConfig) -> None:
    write_text_atomic(run.work_dir / CONFIG_FILE, format_config(record_config(run.mmseg)))
    write_json_atomic(run.work_dir / "deepspeed.json", run.deepspeed)
    write_json_atomic(run.work_dir / "environment.json", describe_environment(run))


def describe_environment(run: RunConfig) -> dict[str, object]:
    """Versions, hardware and command line: what someone needs who wants the same figures."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "world_size": run.world_size,
        "backend": distributed.backend(),
        "seed": run.seed,
        "packages": find_versions(_PACKAGES),
    }
