"""One sample of a dataset, or the error that says which of its files keeps it from loading."""

from __future__ import annotations

import traceback
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.bad_samples import UnreadableSample
from ds_seg.data.build import resolve_sample, sample_paths
from ds_seg.data.lint import find_pair_faults
from ds_seg.data.pair_files import is_on_disk, validate_whole
from ds_seg.errors import DataError

from mmcv.parallel import DataContainer  # isort: skip


def load_or_error(dataset: Any, index: int) -> Any:
    """What the pipeline of a dataset makes of a sample, or a DataError; of its kinds UnreadableSample is the files'."""
    try:
        sample = dataset[index]
        _validate_files(dataset, index)
        return sample
    except Exception as error:  # a pipeline may fail in any way; what a user needs is the file's name
        return sample_error(dataset, index, error)


def _validate_files(dataset: Any, index: int) -> None:
    leaf, inner = resolve_sample(dataset, index)
    if is_on_disk(leaf.file_client_args):
        for path in filter(None, sample_paths(leaf, inner)):
            validate_whole(path)


def sample_error(dataset: Any, index: int, error: Exception) -> DataError:
    """The error that names the files of a sample that did not load, and what is wrong with them."""
    leaf, inner = resolve_sample(dataset, index)
    faults = find_pair_faults(leaf, inner, decode_image=True)
    image_path, annotation_path = sample_paths(leaf, inner)
    if faults:
        unreadable = UnreadableSample("; ".join(faults) + ". Replace or remove the file.")
        unreadable.file = image_path
        return unreadable
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(
        f"image {image_path} (annotation {annotation_path}) can be read, but its pipeline failed: "
        f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}). Correct the pipeline in the config."
    )


def unwrap(value: Any) -> Any:
    """What MMCV's container holds, where something is in one."""
    return value.data if isinstance(value, DataContainer) else value
