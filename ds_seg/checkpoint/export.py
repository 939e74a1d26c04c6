"""A trained model as one file for others: HuggingFace names in safetensors, or MMSegmentation's own `.pth`.

The backbone passes through one parameter at a time, so that a model of any size is exported in little memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ds_seg.checkpoint.description import ModelDescription
from ds_seg.checkpoint.model_weights import ModelWeights
from ds_seg.config.head_fields import auxiliary_head_fields, decode_head_fields
from ds_seg.errors import UserError
from ds_seg.files import sync_folder, validate_output_file, writing
from ds_seg.models.weight_dialects import spell_as_intern_vision
from ds_seg.models.weight_files import SAFETENSORS_DTYPES

SUFFIXES = {"safetensors": ".safetensors", "mmseg": ".pth"}
"""Format -> suffix of its files, by which they are recognised when they are loaded."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a backbone may be stored in, and computes in."""
_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def validate_output(path: Path, file_format: str) -> None:
    """Check that a file of this format can be loaded under this name.

    Raises:
        UserError: it has another suffix, or can't be written.
    """
    wanted = SUFFIXES[file_format]
    if path.suffix != wanted:
        raise UserError(
            f"--out {path}: a file of --format {file_format} is recognised by its suffix {wanted}. Write to "
            f"{path.with_suffix(wanted)} instead."
        )
    validate_output_file("--out", path)


@contextmanager
def write_export(
    path: Path,
    file_format: str,
    weights: ModelWeights,
    description: ModelDescription,
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> Iterator[Path]:
    """Write the file beside its place, hand it over to be checked, and give it its name if that raises nothing.

    Args:
        path: of the file; one that is there is replaced at the end.
        file_format: one of SUFFIXES.
        weights: what to write.
        description: written beside the tensors.
        dtype: of the backbone; the heads stay FP32.
        progress: called with the bytes of each tensor of the backbone and heads that was written.

    Yields:
        The finished file under a temporary name with the same suffix.

    Raises:
        UserError: the file can't be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing("--out", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if file_format == "safetensors":
                tensors = _list_tensors(weights, description.model, dtype, spell_as_intern_vision)
                _write_safetensors(temporary, tensors, description.to_header(), progress)
            else:
                tensors = _list_tensors(weights, description.model, dtype, "backbone.{}".format)
                _write_torch(temporary, tensors, description.to_meta(), progress)
        yield temporary
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def note_for_mmseg(model: Mapping[str, Any]) -> str | None:
    """What has to be changed in a config before InternVL's code computes the same from it."""
    fields = [*decode_head_fields(model), *auxiliary_head_fields(model)]
    asking = [
        field
        for field, head in fields
        if head["type"] == "FCNHead" and head.get("num_convs") == 0 and head.get("concat_input", True)
    ]
    if not asking:
        return None
    return (
        f"for InternVL's own code, set concat_input=False in {' and '.join(asking)}: its FCNHead convolves the "
        "concatenation even with num_convs=0, and this model has no such convolution"
    )


def spell_head(name: str, model: Mapping[str, Any]) -> str:
    """Our name of a tensor of the heads as MMSegmentation's segmentors spell it.

    Args:
        name: such as `auxiliary_heads.0.conv_seg.weight`.
        model: the `model` section: auxiliary heads have numbers only where it lists them.
    """
    if isinstance(model.get("auxiliary_head"), (list, tuple)):
        return name.replace("auxiliary_heads.", "auxiliary_head.", 1)
    return name.replace("auxiliary_heads.0.", "auxiliary_head.", 1)


def _list_tensors(
    weights: ModelWeights, model: Mapping[str, Any], dtype: torch.dtype, spell: Callable[[str], str]
) -> list[_Tensor]:
    """Everything to be written, larger elements first: each tensor then starts at a multiple of its element's size."""
    tensors = [
        _Tensor(spell(name), shape, dtype, lambda name=name: weights.read(name))  # type: ignore[misc]
        for name, shape in weights.shapes.items()
    ]
    tensors += [
        _Tensor(spell_head(name, model), tuple(value.shape), value.dtype, lambda value=value: value)  # type: ignore[misc]
        for name, value in weights.heads.items()
    ]
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def _write_safetensors(
    path: Path, tensors: Sequence[_Tensor], header: Mapping[str, str], progress: Callable[[int], object]
) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants all of them at once.

    Source: the format's description in huggingface/safetensors README.md.
    """
    layout: dict[str, Any] = {"__metadata__": dict(header)}
    start = 0
    for tensor in tensors:
        offsets = [start, start + tensor.bytes]
        layout[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        start += tensor.bytes
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = tensor.read().detach().to(tensor.dtype).contiguous()
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            progress(tensor.bytes)
        file.flush()
        os.fsync(file.fileno())


def _write_torch(
    path: Path, tensors: Sequence[_Tensor], meta: Mapping[str, Any], progress: Callable[[int], object]
) -> None:
    """Write `meta` and `state_dict` as torch does, which wants all tensors at once: mapped from a scratch file."""
    scratch = path.with_suffix(".safetensors")
    try:
        _write_safetensors(scratch, tensors, {"format": "pt"}, progress)
        mapped = safe_open(scratch, "pt")
        state = {tensor.name: mapped.get_tensor(tensor.name) for tensor in tensors}
        with path.open("wb") as file:
            try:
                torch.save({"meta": dict(meta), "state_dict": state}, file)
            except RuntimeError as error:  # torch's own, where the disk refuses
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
    finally:
        if scratch.exists():
            scratch.unlink()
