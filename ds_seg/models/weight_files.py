"""Weight files read lazily: safetensors, torch pickles, and HuggingFace folders that split them in shards.

Both formats are mapped into memory and not read whole: what a process holds of a file are the pages that it has
touched, and the system takes them back when the file is closed. One file is open at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_seg.errors import WeightsError

_NESTING_KEYS = ("module", "state_dict", "model")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".json")
_UNREADABLE = (
    *(SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, zipfile.BadZipFile),
    *(LookupError, AttributeError, TypeError, AssertionError, struct.error),
)
"""What the readers raise of a file of another kind: torch's unpickler takes any bytes for instructions."""
_LFS_POINTER = b"version https://git-lfs"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's codes; those of packed and other types are left out."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: the file that holds it, and its shape and dtype there."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of one checkpoint, whose values are read from disk one by one.

    Args:
        path: a .safetensors, .pth, .pt or .bin file, a HuggingFace *.index.json, or a folder with one of
            HuggingFace's file names in it.

    Attributes:
        entries: every tensor by name, file after file.
        meta: what the file says beside its tensors: a safetensors header, or MMSegmentation's `meta`.
        classes: names of the classes, where an MMSegmentation checkpoint tells them.

    Raises:
        WeightsError: the path does not exist, or what is there can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.meta: Mapping[str, Any] = {}
        self.classes: tuple[str, ...] = ()
        self._opened: _OpenFile | None = None
        files, names_in_index = _list_files(path)
        for file in files:
            opened = self._open(file)
            self.entries.update(opened.list_entries())
            self.meta = opened.meta or self.meta
        self.classes = _parse_classes(self.meta)
        if not self.entries:
            raise WeightsError(f"Weight file {path} holds no tensors. Point to a file with a model's state dict.")
        absent = sorted(names_in_index - self.entries.keys())
        if absent:
            raise WeightsError(
                f"Weight index {path} names {len(absent)} tensors that its shards lack ({', '.join(absent[:4])}). "
                "Index and shards are of different models or versions: download them together."
            )

    def read(self, name: str) -> Tensor:
        """One tensor in CPU memory, in the file's dtype: a view of the file, to be copied before the next call."""
        return self._open(self.entries[name].file).read(name)

    def close(self) -> None:
        """Give the memory of the open file back."""
        self._opened = None

    def _open(self, file: Path) -> _OpenFile:
        if self._opened is not None and self._opened.path == file:
            return self._opened
        self.close()
        try:
            self._opened = _SafetensorsFile(file) if file.suffix == ".safetensors" else _TorchFile(file)
        except _UNREADABLE as error:
            _refuse_pointer(file)
            _refuse_object(file, error)
            raise WeightsError(
                f"Weight file {file} can't be read ({type(error).__name__}: {str(error).partition('. ')[0]}). "
                "It is damaged, cut short or not a weight file: download or copy it again and compare sizes."
            ) from error
        return self._opened


def _refuse_pointer(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(
                f"Weight file {file} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned."
            )


def _refuse_object(file: Path, error: Exception) -> None:
    """Of a class that torch does not unpickle unasked, which it names in its message."""
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        raise WeightsError(
            f"Weight file {file} holds a {found[1]} beside its tensors, and objects are not read because they may run "
            'any code. If you trust the file, save its weights alone: python -c "import torch; torch.save('
            f"{{'state_dict': torch.load('{file}', weights_only=False)['state_dict']}}, 'weights.pth')\""
        ) from error


def is_weight_path(path: Path) -> bool:
    """Whether a path names a weight file, existing or not, or a folder with one of HuggingFace's file names in it."""
    if path.is_dir():
        return any((path / name).is_file() for name in (*_INDEX_NAMES, *_SINGLE_NAMES))
    return path.is_file() or path.suffix in _SUFFIXES


def describe_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """The entries of tensors that were read from a file."""
    return {name: TensorEntry(path, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class _OpenFile(Protocol):
    path: Path
    meta: Mapping[str, Any]

    def list_entries(self) -> Iterator[tuple[str, TensorEntry]]: ...

    def read(self, name: str) -> Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = safe_open(str(path), framework="pt", device="cpu")
        self.meta: Mapping[str, Any] = self._handle.metadata() or {}

    def list_entries(self) -> Iterator[tuple[str, TensorEntry]]:
        for name in self._handle.keys():  # noqa: SIM118  (not a dict)
            part = self._handle.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)  # what is packed counts as no number
            yield name, TensorEntry(self.path, tuple(part.get_shape()), dtype)

    def read(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        with torch.serialization.safe_globals(_numpy_types()):
            # only the zip format can be mapped; older pickles are read whole
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        meta = loaded.get("meta") if isinstance(loaded, Mapping) else None
        self.meta: Mapping[str, Any] = meta if isinstance(meta, Mapping) else {}
        self._tensors = {name: value for name, value in _unnest(loaded).items() if isinstance(value, Tensor)}

    def list_entries(self) -> Iterator[tuple[str, TensorEntry]]:
        yield from describe_tensors(self.path, self._tensors).items()

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _unnest(loaded: Any) -> Mapping[str, Any]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _NESTING_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    return {}


def _parse_classes(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """What MMSegmentation's `meta` says of the classes; a safetensors header holds it as JSON."""
    classes = meta.get("CLASSES")
    return tuple(map(str, json.loads(classes) if isinstance(classes, str) else classes or ()))


def _numpy_types() -> list[Any]:
    """Types of numpy's numbers and arrays: MMCV leaves the best score as one of them beside the weights.

    numpy 2 has moved their constructors, and a file names the place of the numpy that wrote it.
    """
    constructors = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}  # type: ignore[index]
    moved = [
        (made, f"{module}.{name}")
        for name, made in constructors.items()
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    ]
    return [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}, *moved]


def _list_files(path: Path) -> tuple[list[Path], set[str]]:
    """The files of a checkpoint, and the tensors that its index names, if it has one."""
    if path.is_dir():
        names = [name for name in (*_INDEX_NAMES, *_SINGLE_NAMES) if (path / name).is_file()]
        if not names:
            raise WeightsError(
                f"Weight folder {path} holds none of {', '.join((*_INDEX_NAMES, *_SINGLE_NAMES))}. "
                "Name the weight file itself."
            )
        path = path / names[0]
    if not path.is_file():
        raise WeightsError(f"Weight file {path} does not exist. Check the path, or download the file there first.")
    if path.suffix != ".json":
        return [path], set()
    try:
        shard_of = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"Weight index {path} has no 'weight_map' of tensor names to shard files. Download it again."
        ) from error
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise WeightsError(f"Weight index {path} names shards that are not beside it: {missing}. Download them.")
    return [path.parent / shard for shard in shards], set(shard_of)
