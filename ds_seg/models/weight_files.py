"""Weight files read lazily: safetensors, torch pickles, and HuggingFace folders that split them in shards."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_seg.errors import WeightsError

_NESTING_KEYS = ("module", "state_dict", "model")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")


class WeightFiles:
    """The tensors of one checkpoint, whose values are read from disk one by one.

    Args:
        path: a .safetensors, .pth, .pt or .bin file, a HuggingFace *.index.json, or a folder with one of
            HuggingFace's file names in it.

    Raises:
        WeightsError: the path does not exist, or what is there can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file in _list_files(path):
            try:
                self._open(file)
            except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
                raise WeightsError(
                    f"Weight file {file} can't be read ({type(error).__name__}: {str(error).partition('. ')[0]}). "
                    "It is damaged, cut short, or holds more than tensors: download or copy it again and compare "
                    "sizes, or save its state dict alone."
                ) from error
        if not self.shapes:
            raise WeightsError(f"Weight file {path} holds no tensors. Point to a file with a model's state dict.")

    def read(self, name: str) -> Tensor:
        """Read one tensor into CPU memory, in the file's dtype."""
        return self._readers[name]()

    def _open(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            handle = safe_open(str(file), framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._readers[name] = partial(handle.get_tensor, name)
            return
        # only the zip format can be mapped; older pickles are read whole
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        for name, tensor in _unnest(loaded).items():
            if isinstance(tensor, Tensor):
                self.shapes[name] = tuple(tensor.shape)
                self._readers[name] = partial(torch.as_tensor, tensor)


def _unnest(loaded: Any) -> Mapping[str, Any]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _NESTING_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    return {}


def _list_files(path: Path) -> Iterable[Path]:
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
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"Weight index {path} has no 'weight_map' of tensor names to shard files. Download it again."
        ) from error
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise WeightsError(f"Weight index {path} names shards that are not beside it: {missing}. Download them.")
    return [path.parent / shard for shard in shards]
