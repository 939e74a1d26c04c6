"""A save that is killed at any instant leaves the old checkpoint or the new one whole.

The save runs in a forked child that ends itself before its n-th change of the disk, for every n. What it has written
and not flushed by then is cut in half, as after a power cut.
"""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from ds_seg.checkpoint import choose_resume_point, resolve_checkpoint
from ds_seg.checkpoint.manifest import verify_files
from ds_seg.checkpoint.store import BEST, LATEST, checkpoints_folder, drop_leftovers, list_folders
from saved import amend_checkpoint, make_checkpoint, read_text

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
KILLED, DONE = 77, 78
CASES = {
    # what is saved on top of steps 10 (the best) and 20, and what may be found after a kill
    "pruning": {"step": 30, "best": "step_000030", "keep": 1},
    "replacing": {"step": 20, "best": "step_000010"},
    "amending": {"step": 20, "best": "step_000020", "change": amend_checkpoint},
}


def kill_before(change: int) -> None:
    """End this process before its so many-th change of the disk."""
    count, unflushed = 0, set()

    def tick() -> None:
        nonlocal count
        count += 1
        if count == change:
            for path in filter(Path.is_file, map(Path, unflushed)):
                os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)

    def hook(event: str, arguments: tuple) -> None:
        writes = event != "open" or (arguments[1] or "r")[0] != "r" or (arguments[2] or 0) & os.O_CREAT
        if count < change and event in CHANGES and writes:
            tick()
            if event == "open":
                unflushed.add(os.path.realpath(arguments[0]))

    def fsync(descriptor: int, own=os.fsync) -> None:
        tick()
        own(descriptor)
        unflushed.discard(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    sys.addaudithook(hook)
    os.fsync = fsync


def save_in_child(work_dir, change_number: int, *, change=make_checkpoint, **save) -> bool:
    """Whether the save came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(30)
            kill_before(change_number)
            change(work_dir, text="new", **save)
            os._exit(DONE)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (KILLED, DONE), code
    return code == DONE


@pytest.mark.parametrize("case", CASES)
def test_after_a_kill_the_old_or_the_new_checkpoint_is_whole(tmp_path, case):
    start = tmp_path / "start"
    make_checkpoint(start, 10, best="step_000010")
    make_checkpoint(start, 20, best="step_000010")
    found, done, change = [], False, 0
    while not done:
        change += 1
        work_dir = tmp_path / str(change)
        shutil.copytree(start, work_dir)
        done = save_in_child(work_dir, change, **CASES[case])
        check_readers(work_dir)
        drop_leftovers(work_dir)  # what the next run begins with
        found.append(read_text(choose_resume_point(work_dir, "auto", pytest.fail)))
        check_tidy(work_dir)
        make_checkpoint(work_dir, 40)
        assert read_text(resolve_checkpoint(str(work_dir))) == "step_000040"
        shutil.rmtree(work_dir)
    assert set(found) == {"step_000020", "new"} and found == sorted(found, key=["step_000020", "new"].index)
    assert len(found) > 25


def check_readers(work_dir):
    """An evaluation that starts now finds a whole checkpoint, and does not touch the work dir."""
    before = sorted(checkpoints_folder(work_dir).iterdir())
    names = (LATEST, BEST, (checkpoints_folder(work_dir) / LATEST).read_text().strip())
    for path in (work_dir, *(checkpoints_folder(work_dir) / name for name in names)):
        verify_files(resolve_checkpoint(str(path)), 0, 1)
    assert sorted(checkpoints_folder(work_dir).iterdir()) == before


def check_tidy(work_dir):
    folders = [path for path in checkpoints_folder(work_dir).iterdir() if path.is_dir()]
    assert sorted(folders) == sorted(list_folders(work_dir)) and all(path.name[0] != "." for path in folders)
    for folder in folders:
        verify_files(folder, 0, 1)
