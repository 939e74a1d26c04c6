"""One run a work dir: a lock that its holder's death releases.

It is a POSIX record lock of the first rank. The kernel drops it with the process, however that ends, so a file that a
crash leaves behind holds nobody up; and data workers, which are forked, do not inherit it. Across hosts it holds where
the file system keeps such locks for all of them: NFS with its lock service, GPFS, Lustre mounted with `flock`. Where
locks are refused outright the run says so and goes on; where they are local to a host (Lustre's `localflock`, NFS's
`nolock`) only runs of the same host are told apart.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ds_seg import distributed
from ds_seg.errors import UserError

LOCK_FILE = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_PATIENCE_S = 5.0
"""For a run that was killed a moment ago, or is about to end."""


@contextlib.contextmanager
def hold_work_dir(work_dir: Path) -> Iterator[None]:
    """Keep every other run from writing this work dir; a collective over all ranks.

    Reading needs no lock: evaluations, predictions and exports go on beside a run.

    Raises:
        UserError: another run holds it, or it can't be written.
    """
    file = distributed.agree(lambda: _acquire(work_dir) if distributed.is_main() else None)
    try:
        yield
    finally:
        if file is not None:
            file.close()  # which releases the lock; the file stays, for removing it would race with the next run


def _acquire(work_dir: Path) -> IO[str]:
    path = work_dir / LOCK_FILE
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Work dir {work_dir} can't be written: {error}. Choose another --work-dir.") from error
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                print(f"warning: the file system of {work_dir} refuses locks ({error}); start only one run there")
                return file
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            raise UserError(
                f"Work dir {work_dir} is in use: {_describe_holder(file)} still writes it. Wait for that run or stop "
                "it, or choose another --work-dir. (A run that crashed holds nothing.)"
            ) from error
        _introduce(file)
        return file


def _introduce(file: IO[str]) -> None:
    since = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": " ".join(sys.argv)}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, namelessly
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()


def _describe_holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']}: {holder['command']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
