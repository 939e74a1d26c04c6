"""What an exported file says beside its tensors: enough to build the model and to use it as `ds-seg predict` does.

Classes and palette are told as MMSegmentation tells them. The rest is one Python literal under one key: MMSeg tells a
list of scales from one scale by list and tuple, which JSON would not keep.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_seg.checkpoint.training_state import read_state
from ds_seg.config import RunConfig
from ds_seg.config.data_section import evaluation_role
from ds_seg.config.head_fields import predicting_head
from ds_seg.data.head_fit import find_wrong_counts
from ds_seg.data.images import ArrayPipeline, inference_section, open_images
from ds_seg.errors import ConfigError, WeightsError
from ds_seg.models.weight_files import WeightFiles, is_weight_path

_KEY = "ds_seg"
_VERSION = 1
_ONLY_FOR_TRAINING = ("pretrained", "init_cfg", "class_weight", "file_client_args")
"""Keys that may name files of the machine that trained."""


@dataclass(frozen=True)
class ModelDescription:
    """A trained model without its weights.

    Attributes:
        classes: Names in the order of the class ids.
        palette: RGB colour of each class, 0..255.
        model: MMSeg's `model` section: backbone, heads, test_cfg.
        pipeline: MMSeg test pipeline: reading, sizes, normalisation.
        dtype: What the backbone computes in.
        window_batch: Most windows in one forward.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    model: dict[str, Any]
    pipeline: list[dict[str, Any]]
    dtype: torch.dtype
    window_batch: int

    def to_header(self) -> dict[str, str]:
        """As a safetensors header holds it: text under names."""
        return {
            "format": "pt",
            "CLASSES": json.dumps(self.classes),
            "PALETTE": json.dumps(self.palette),
            _KEY: self._to_literal(),
        }

    def to_meta(self) -> dict[str, Any]:
        """As MMSegmentation's `meta` holds it."""
        palette = [list(colour) for colour in self.palette]
        return {"CLASSES": self.classes, "PALETTE": palette, _KEY: self._to_literal()}

    def _to_literal(self) -> str:
        return repr(
            {
                "version": _VERSION,
                "model": self.model,
                "pipeline": self.pipeline,
                "dtype": str(self.dtype).removeprefix("torch."),
                "window_batch": self.window_batch,
            }
        )


def describe_model_of(run: RunConfig) -> ModelDescription:
    """What the files of a run's model say.

    Raises:
        ConfigError: the head has another number of classes than the dataset, images in memory can't go through the
            test pipeline, or the config holds something that can't be written down.
    """
    dataset = open_images(run.data, [])
    section, field = inference_section(run.data), f"data.{evaluation_role(run.data)}"
    if misfits := list(find_wrong_counts(*predicting_head(run.model), field, dataset)):
        raise ConfigError("\n".join(misfits))
    ArrayPipeline(section["pipeline"])
    model = {key: value for key, value in run.model.items() if key != "train_cfg"}
    return ModelDescription(
        classes=tuple(map(str, dataset.CLASSES)),
        palette=_to_palette(dataset.PALETTE),
        model=_to_plain(model, "model"),
        pipeline=_to_plain(section["pipeline"], f"{field}.pipeline"),
        dtype=run.dtype,
        window_batch=run.evaluation.window_batch,
    )


def read_description(path: object, meta: Mapping[str, Any]) -> ModelDescription:
    """What a file says of its model.

    Args:
        path: of the file, for messages.
        meta: of the file, either form.

    Raises:
        WeightsError: it says nothing, or nothing that this version understands.
    """
    if _KEY not in meta:
        raise WeightsError(
            f"{path} was not exported by ds-seg: it does not describe the model of its weights. Export one with "
            "'ds-seg export CONFIG CHECKPOINT --format safetensors --out F', where CHECKPOINT may be this very file."
        )
    try:
        content = ast.literal_eval(meta[_KEY])
        if content["version"] != _VERSION:
            raise ValueError(f"layout {content['version']}, known is {_VERSION}")
        classes, palette = (json.loads(v) if isinstance(v, str) else v for v in (meta["CLASSES"], meta["PALETTE"]))
        return ModelDescription(
            classes=tuple(classes),
            palette=_to_palette(palette),
            model=content["model"],
            pipeline=content["pipeline"],
            dtype=getattr(torch, content["dtype"]),
            window_batch=content["window_batch"],
        )
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} describes its model in a way that this ds-seg can't read ({type(error).__name__}: {error}). "
            "Export the checkpoint again with the ds-seg that is to read it."
        ) from error


def read_trained_dtype(source: Path) -> torch.dtype | None:
    """What the backbone of a checkpoint or an exported file computed in when it was trained; None: it does not tell.

    Args:
        source: see `resolve_weights`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        WeightsError: the file can't be read.
    """
    if not is_weight_path(source):
        return torch.bfloat16 if read_state(source)["bf16"] else torch.float32
    meta = WeightFiles(source).meta
    return read_description(source, meta).dtype if _KEY in meta else None


def _to_palette(colours: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(red), int(green), int(blue)) for red, green, blue in colours)


def _to_plain(value: Any, field: str) -> Any:
    """A config value as a Python literal can hold it, without what only training reads."""
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if key not in _ONLY_FOR_TRAINING}
        return {key: _to_plain(item, f"{field}.{key}") for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_plain(item, f"{field}[{index}]") for index, item in enumerate(value))
    if hasattr(value, "tolist"):
        return _to_plain(value.tolist(), field)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{field} is {value!r}, which an exported file can't hold. Write it as a number, text, list or dict."
    )
