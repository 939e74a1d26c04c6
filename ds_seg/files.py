"""Files that survive a crash: there whole or not at all, and names that are on the disk."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ds_seg.errors import UserError

T = TypeVar("T")

_SHOWN_AFTER_S = 30.0
"""For so long an NFS client may go by what it knew of a folder."""


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, never a mixture.

    Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # what is there of it takes space that may be what is missing
        raise
    sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `write_bytes_atomic` does; names of files that are no UTF-8 become escapes."""
    write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_lasting(find: Callable[[], T]) -> T:
    """What `find` still finds amiss when a network file system has had time to show what other nodes have written."""
    end = time.monotonic() + _SHOWN_AFTER_S
    while (amiss := find()) and time.monotonic() < end:
        time.sleep(0.1)
    return amiss


def validate_output_file(option: str, path: Path) -> None:
    """Check, before the work begins, that a file can be written where the user wants it.

    Args:
        option: that names it, for messages.
        path: of the file; one that is there is replaced, its folders are made.

    Raises:
        UserError: something else than a file is there, or its folder can't be written.
    """
    validate_output_folder(option, path.absolute().parent)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{option} {path} is {kind}, but must be a file. Choose another {option}.")


def validate_output_folder(option: str, path: Path) -> None:
    """Check, before the work begins, that files can be written into a folder, which is made if need be.

    Args:
        option: that names it, for messages.
        path: of the folder.

    Raises:
        UserError: it, or what it is to be made in, is no folder or can't be written.
    """
    with writing(option, path):
        folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file, but must be a folder. Choose another {option}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option}: folder {folder} can't be written. Choose another {option}, or make it writable.")


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Say what could not be written where the disk refuses what is done within.

    Args:
        option: that names it, for the message.
        path: what the user asked for.

    Raises:
        UserError: the disk is full, or refuses something else.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} {path} can't be written: {error}. Choose another {option}, or make room there."
        ) from error
