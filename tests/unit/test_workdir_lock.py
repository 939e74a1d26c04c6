import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from ds_seg import workdir_lock
from ds_seg.errors import UserError
from ds_seg.workdir_lock import LOCK_FILE, hold_work_dir
from ranks import run_ranks

HOLD = """
import os, sys, time
from pathlib import Path
from ds_seg.workdir_lock import hold_work_dir
with hold_work_dir(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""
LET_GO_OF = """
import fcntl, sys, time
with open(sys.argv[1], "a+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(0.3)
"""
OWN_DISKS = """
import sys
from pathlib import Path
from ds_seg import distributed, files
from ds_seg.errors import UserError
from ds_seg.workdir_lock import hold_work_dir
distributed.initialize()
files._SHOWN_AFTER_S = 0.3
for name in ("shared", f"node{distributed.rank()}", "shared"):
    try:
        with hold_work_dir(Path(sys.argv[1]) / name):
            print(f"rank {distributed.rank()} holds {name}", flush=True)
    except UserError as error:
        print(f"rank {distributed.rank()}: {error}", flush=True)
distributed.shutdown()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds a work dir, and its forked child, as a data worker is one."""
    monkeypatch.setattr(workdir_lock, "_PATIENCE_S", 0.3)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_work_dir_that_a_run_is_about_to_let_go_of_is_waited_for(tmp_path):
    command = [sys.executable, "-c", LET_GO_OF, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with hold_work_dir(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_held_work_dir_is_refused_with_its_holder_until_that_dies(tmp_path, holder):
    text = (
        rf"in use: process {holder.pid} on \S+ \(since 20\d\d-.* UTC: .*\) still writes it\. Wait for that run or stop"
    )
    with pytest.raises(UserError, match=text), hold_work_dir(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with hold_work_dir(tmp_path / "run"):  # although its child lives on
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_holder_that_could_not_write_its_name_is_refused_all_the_same(tmp_path, holder):
    (tmp_path / "run" / LOCK_FILE).write_text("{")
    with pytest.raises(UserError, match="in use: another run still writes it"), hold_work_dir(tmp_path / "run"):
        pass


def test_it_is_released_at_the_end(tmp_path):
    for _ in range(2):
        with hold_work_dir(tmp_path / "run"):
            pass
    check = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", check, str(tmp_path / "run" / LOCK_FILE)]).returncode == 0


def test_a_work_dir_that_the_ranks_do_not_share_is_refused_by_all(tmp_path):
    (tmp_path / "worker.py").write_text(OWN_DISKS)
    told = run_ranks(tmp_path / "worker.py", 2, tmp_path, timeout_s=120)
    for rank in range(2):
        assert told.count(f"rank {rank} holds shared") == 2
        text = (
            rf"rank {rank}: Work dir \S+/node1 is not the same folder for all processes: what rank 0 wrote to run\.lock"
        )
        assert re.search(rf"{text} there, rank 1 on \S+ does not find\. .* file system that all nodes share", told), (
            told
        )


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with hold_work_dir(tmp_path / "run"):
        pass
    assert re.search(r"warning: the file system of .*run refuses locks \(.*No locks", capsys.readouterr().out)


def test_a_work_dir_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"can't be written: .*Choose another --work-dir"),
        hold_work_dir(tmp_path / "file"),
    ):
        pass
