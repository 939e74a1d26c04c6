"""The list of a checkpoint's files with sizes and checksums: what makes a damaged one tell."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from ds_seg.errors import CheckpointError
from ds_seg.supervision.progress import tick

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 24


class FileEntry(TypedDict):
    """One file of a checkpoint."""

    bytes: int
    crc32: int


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Flush each named file to the disk and return its size and checksum."""
    sealed = {}
    for name in names:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        sealed[name] = _measure(folder / name)
    return sealed


def write_manifest(folder: Path, entries: dict[str, FileEntry]) -> None:
    """Write the manifest of a checkpoint folder and flush it and all folders of its files to the disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for parent in {folder, *((folder / name).parent for name in entries)}:
        sync_folder(parent)


def verify_files(folder: Path, rank: int, world_size: int) -> None:
    """Read this rank's share of a checkpoint's files and compare them with the manifest.

    Raises:
        CheckpointError: a file is missing, has another size, or another checksum.
    """
    entries = read_manifest(folder)
    for name in sorted(entries)[rank::world_size]:
        path, wanted = folder / name, entries[name]
        if not path.is_file():
            raise CheckpointError(f"Checkpoint {folder} is damaged: {name} is missing. {_remedy(folder)}")
        found = _measure(path) if path.stat().st_size == wanted["bytes"] else None
        if found != wanted:
            detail = "has another checksum" if found else f"has {path.stat().st_size} bytes, want {wanted['bytes']}"
            raise CheckpointError(f"Checkpoint {folder} is damaged: {name} {detail}. {_remedy(folder)}")


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """The manifest's entries.

    Raises:
        CheckpointError: `folder` holds no readable manifest, so it is not a complete checkpoint.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": int(entry["bytes"]), "crc32": int(entry["crc32"])} for name, entry in listed.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a ds_seg checkpoint: it has no {MANIFEST}. Name a folder like "
            "WORK_DIR/checkpoints/step_000100, or a work dir that holds one."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {MANIFEST} can't be read. {_remedy(folder)}") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> FileEntry:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
            tick()
    return {"bytes": size, "crc32": checksum}


def _remedy(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob("step_*") if path != folder)
    return f"Use another one: {', '.join(others)}." if others else "There is no other one beside it: start anew."
