"""JSON files that are there whole or not at all, and what becomes of odd values in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_seg.files import write_text_atomic, writing


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


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write an object as indented JSON, atomically; see `to_json_value` for what becomes of odd values."""
    write_text_atomic(path, json.dumps(to_json_value(obj), indent=2, allow_nan=False) + "\n")


def write_json_output(option: str, path: Path, obj: Any) -> None:
    """Write a JSON file that the user asked for, and say so.

    Args:
        option: that names it, for messages.
        path: of the file.
        obj: as for `write_json_atomic`.

    Raises:
        UserError: the disk refuses it.
    """
    with writing(option, path):
        write_json_atomic(path, obj)
    print(f"wrote {path}", flush=True)
