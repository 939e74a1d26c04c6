"""The list of a checkpoint's files with sizes and checksums: what makes a damaged one tell."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from ds_seg.errors import CheckpointError
from ds_seg.files import sync_folder
from ds_seg.supervision.progress import tick

MANIFEST = "manifest.json"
_DIGEST = "digest"
"""Key of the checksum of everything else in the manifest."""
_CHUNK_BYTES = 1 << 24


class FileEntry(TypedDict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: Optimizer steps that lead to it.
        world_size: Processes that wrote it.
        config_digest: SHA-256 of the resolved config.
        versions: Of the packages that wrote it.
        files: Path in the folder -> size and SHA-256.
    """

    step: int
    world_size: int
    config_digest: str
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Flush each named file to the disk and return its size and checksum."""
    sealed = {}
    for name in names:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        sealed[name] = _measure(folder / name)
    return sealed


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint folder and flush it and all folders of its files to the disk."""
    content = asdict(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**content, _DIGEST: _digest(content)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for parent in {folder, *((folder / name).parent for name in manifest.files)}:
        sync_folder(parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: `folder` holds no manifest, or one that is damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content.pop(_DIGEST) != _digest(content):
            raise ValueError
        return Manifest(**content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a ds_seg checkpoint: it has no {MANIFEST}. Name a folder like "
            "WORK_DIR/checkpoints/step_000100, or a work dir that holds one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {MANIFEST} can't be read. {_remedy(folder)}") from error


def list_files(folder: Path, inside: str) -> list[Path]:
    """The files of a checkpoint in one of its folders, as the manifest lists them; a stray file beside them is none.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return [folder / name for name in sorted(read_manifest(folder).files) if Path(name).parent == Path(inside)]


def find_misfits(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Which files this process does not see there, or with another size, each in words; nothing is read."""
    return [f"{name} {misfit}" for name, wanted in files.items() if (misfit := _find_misfit(folder / name, wanted))]


def verify_files(folder: Path, rank: int, world_size: int) -> None:
    """Read this rank's share of a checkpoint's files and compare them with the manifest.

    Files that the manifest does not list are not looked at.

    Raises:
        CheckpointError: files are missing, or have another size or checksum.
    """
    files = read_manifest(folder).files
    _compare(folder, {name: files[name] for name in sorted(files)[rank::world_size]})


def verify_file(folder: Path, name: str) -> None:
    """Compare one file of a checkpoint with the manifest.

    Raises:
        CheckpointError: it is missing, or has another size or checksum.
    """
    _compare(folder, {name: read_manifest(folder).files[name]})


def _compare(folder: Path, files: Mapping[str, FileEntry]) -> None:
    faults = [f"{name} {fault}" for name, wanted in files.items() if (fault := _find_fault(folder / name, wanted))]
    if faults:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {'; '.join(faults)}. {_remedy(folder)}")


def _find_fault(path: Path, wanted: FileEntry) -> str | None:
    try:
        if misfit := _find_misfit(path, wanted):
            return misfit
        return None if _measure(path) == wanted else "has another checksum"
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _find_misfit(path: Path, wanted: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    return None if size == wanted["bytes"] else f"has {size} bytes, want {wanted['bytes']}"


def _measure(path: Path) -> FileEntry:
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
            tick()
    return {"bytes": size, "sha256": checksum.hexdigest()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remedy(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob("step_*") if path != folder)
    return f"Use another one: {', '.join(others)}." if others else "There is no other checkpoint beside it: start over."
