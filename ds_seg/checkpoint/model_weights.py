"""A trained model's weights as an export sees them, wherever they come from.

The backbone is read one parameter at a time; heads are small enough to be held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ds_seg.checkpoint.manifest import verify_files
from ds_seg.checkpoint.saved_weights import SavedBackbone, read_saved_heads
from ds_seg.checkpoint.training_state import read_state, validate_same_model
from ds_seg.models.weight_dialects import translate_head_names, translate_names
from ds_seg.models.weight_files import WeightFiles


@dataclass(frozen=True)
class ModelWeights:
    """Weights of a backbone and its heads, under our names.

    Attributes:
        shapes: Shape of every parameter of the backbone.
        read: One of them, on the CPU; to be used before the next is read.
        heads: State of the heads, FP32.
        averaged: Whether they are averages of weights (EMA).
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    heads: dict[str, Tensor]
    averaged: bool = False


def open_checkpoint(folder: Path, backbone: nn.Module, heads: nn.Module) -> ModelWeights:
    """The weights in a checkpoint of any world size, all of whose files are verified first.

    Args:
        folder: the checkpoint.
        backbone: as the config builds it, on any device; only its shapes are read.
        heads: the same.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    verify_files(folder, 0, 1)
    content = read_state(folder)
    validate_same_model(folder, content, backbone, heads)
    saved = SavedBackbone(folder, content)
    return ModelWeights(saved.shapes, saved.read, read_saved_heads(folder), averaged=content["averaged"])


def open_modules(backbone: nn.Module, heads: nn.Module) -> ModelWeights:
    """The weights that modules hold."""
    state = backbone.state_dict()
    return ModelWeights(
        {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__, heads.state_dict()
    )


def open_exported(path: Path) -> ModelWeights:
    """The weights in an exported file, by the same translation of names as when it is loaded."""
    files = WeightFiles(path)
    heads = translate_head_names(files.entries)
    sources = translate_names(name for name in files.entries if name not in heads.values()).sources
    return ModelWeights(
        shapes={name: files.entries[source].shape for name, (source,) in sources.items()},
        read=lambda name: files.read(sources[name][0]),
        heads={name: files.read(source) for name, source in heads.items()},
    )
