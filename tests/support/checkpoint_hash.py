"""A hash of what a checkpoint holds, to compare one run with another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def hash_tensors(checkpoint: Path) -> str:
    """A hash of every tensor and number in a checkpoint's files: weights, moments, averages, Adam's steps.

    All but the rate that the last step used: a resumed life that is stopped before its first step has used none.
    """
    digest, hashed_bytes = hashlib.sha256(), 0
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=False)
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            continue
        for name, value in _walk(content, str(path.relative_to(checkpoint))):
            if name.endswith("/lr"):
                continue
            digest.update(name.encode())
            digest.update(value)
            hashed_bytes += len(value)
    assert hashed_bytes > 4 * 3 * 60_000, f"{checkpoint} holds only {hashed_bytes} bytes"  # masters and two moments
    return digest.hexdigest()


def _walk(value: Any, name: str) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, torch.Tensor):
        yield (
            f"{name} {value.dtype} {tuple(value.shape)}",
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _walk(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}/{index}")
    elif isinstance(value, (int, float)):
        yield name, repr(value).encode()
