"""One run a work dir, and one work dir for all its ranks: a lock that its holder's death releases.

It is a POSIX record lock of the first rank. The kernel drops it with the process, however that ends, so a file that a
crash leaves behind holds nobody up; and data workers, which are forked, do not inherit it. Across hosts it holds where
the file system keeps such locks for all of them: NFS with its lock service, GPFS, Lustre mounted with `flock`. Where
locks are refused outright the run says so and goes on; where they are local to a host (Lustre's `localflock`, NFS's
`nolock`) only runs of the same host are told apart.

What the holder writes into the file all other ranks must see there: else the nodes don't share the work dir, and no
checkpoint would ever be whole.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ds_seg import distributed
from ds_seg.errors import UserError
from ds_seg.files import find_lasting

LOCK_FILE = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_PATIENCE_S = 5.0
"""For a run that was killed a moment ago, or is about to end."""


@contextlib.contextmanager
def hold_work_dir(work_dir: Path) -> Iterator[None]:
    """Keep every other run from writing this work dir; a collective over all ranks.

    Reading needs no lock: evaluations, predictions and exports go on beside a run.

    Raises:
        UserError: another run holds it, it can't be written, or it is not the same folder for all ranks.
    """
    file = distributed.agree(lambda: _acquire(work_dir) if distributed.is_main() else None)
    try:
        holder = distributed.broadcast_object(_read(file) if file is not None else b"")
        distributed.agree(lambda: _validate_shared(work_dir, holder))
        yield
    finally:
        if file is not None:
            file.close()  # which releases the lock; the file stays, for removing it would race with the next run


def _acquire(work_dir: Path) -> IO[bytes]:
    path = work_dir / LOCK_FILE
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"Work dir {work_dir} can't be written: {error}. Choose another --work-dir.") from error
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _HELD:
                print(f"warning: the file system of {work_dir} refuses locks ({error}); start only one run there")
                break
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            raise UserError(
                f"Work dir {work_dir} is in use: {_describe_holder(file)} still writes it. Wait for that run or stop "
                "it, or choose another --work-dir. (A run that crashed holds nothing.)"
            ) from error
    _introduce(file)
    return file


def _introduce(file: IO[bytes]) -> None:
    since = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": shlex.join(sys.argv)}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, namelessly
        file.truncate(0)
        file.write(f"{json.dumps(holder)}\n".encode())
        os.fsync(file.fileno())


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _validate_shared(work_dir: Path, holder: bytes) -> None:
    if distributed.is_main() or not holder:  # to close the file a second time would release the lock
        return
    if find_lasting(lambda: not _is_there(work_dir / LOCK_FILE, holder)):
        raise UserError(
            f"Work dir {work_dir} is not the same folder for all processes: what rank 0 wrote to {LOCK_FILE} there, "
            f"rank {distributed.rank()} on {socket.gethostname()} does not find. Every process writes its own part of "
            "a checkpoint: choose a --work-dir on a file system that all nodes share."
        )


def _is_there(path: Path, content: bytes) -> bool:
    with contextlib.suppress(OSError):
        return path.read_bytes() == content
    return False


def _describe_holder(file: IO[bytes]) -> str:
    try:
        holder = json.loads(_read(file))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']}: {holder['command']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
