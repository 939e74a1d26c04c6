"""Text and JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json_value(value: Any) -> Any:
    """Turn a value into what JSON can hold, all the way down.

    NaN and infinities become null, tensors and numpy arrays lists or numbers, tuples lists; paths, dtypes and
    other objects their text.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a crash at any moment leaves the old content or the new, never a mixture.

    Its folder is made if need be.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)  # what is there of it takes space that may be what is missing
        raise
    folder = os.open(target.parent, os.O_RDONLY)  # the rename itself is only durable once its folder is synced
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as indented JSON, atomically; see `to_json_value` for what becomes of odd values."""
    write_text_atomic(path, json.dumps(to_json_value(obj), indent=2, allow_nan=False) + "\n")
