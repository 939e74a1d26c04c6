"""Images as an evaluation takes them, in all their views, and the annotations that they are scored against.

Shape legend: H and W px of an image; 1 and 3 are channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ds_seg.data.build import resolve_sample, sample_paths
from ds_seg.data.loader import load_ahead
from ds_seg.data.noise import seeded_noise
from ds_seg.data.pair_files import read_image_size
from ds_seg.data.samples import load_or_error, sample_error, unwrap
from ds_seg.errors import ConfigError, DataError

_OF_EACH_VIEW = ("img_shape", "ori_shape")
_OF_SEVERAL_VIEWS = ("flip", "flip_direction")


@dataclass(frozen=True)
class EvaluationSample:
    """One image of a test dataset in each of its augmented views."""

    index: int
    views: list[tuple[torch.Tensor, dict[str, Any]]]
    """(1, 3, H, W) float32 image and its img_metas, one a scale and flip."""


def load_evaluation_samples(dataset: Any, indices: Sequence[int], *, num_workers: int) -> Iterator[EvaluationSample]:
    """Iterate over the samples `indices` of a test-mode dataset, in that order.

    Args:
        dataset: MMSeg dataset in test mode.
        indices: Into `dataset`.
        num_workers: Processes that load ahead; 0 loads in this one.

    Returns:
        An iterator of one sample an index, with one view for each scale and flip of the test pipeline.

    Raises:
        DataError: from the iterator: a sample fails.
        ConfigError: from the iterator: the pipeline does not collect img, or not what is needed of it.
    """
    batches = ([index] for index in indices)
    return load_ahead(_TestViews(dataset), batches, _first, num_workers=num_workers)


def load_ground_truth(dataset: Any, index: int) -> np.ndarray:
    """Load the annotation of a sample as class ids.

    Args:
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
        index: Of the sample.

    Returns:
        (H, W) uint8 class ids at the image's own size, `ignore_index` where ignored (label 0 reduced).

    Raises:
        DataError: there is no annotation, it can't be read, or its size is not the image's.
    """
    leaf, inner = resolve_sample(dataset, index)
    image_path, annotation_path = sample_paths(leaf, inner)
    if annotation_path is None:
        raise DataError(f"image {image_path} can't be scored: its dataset has no ann_dir. Set ann_dir in the config.")
    try:
        label_HW = leaf.get_gt_seg_map_by_idx(inner)
        size_HW = read_image_size(bytes(leaf.file_client.get(image_path)))
    except Exception as error:  # any decoder's failure means one thing here: this pair can't be read
        raise sample_error(dataset, index, error) from error
    if label_HW.shape != size_HW:
        raise DataError(
            f"annotation {annotation_path} has shape {label_HW.shape}, but its image {image_path} has height and "
            f"width {size_HW}. Replace one of them."
        )
    if leaf.reduce_zero_label and not leaf.gt_seg_map_loader.reduce_zero_label:
        reduced_HW = label_HW - np.uint8(1)
        label_HW = np.where((label_HW == 0) | (label_HW == 255), np.uint8(leaf.ignore_index), reduced_HW)
    return label_HW


def load_image_file(dataset: Any, index: int) -> tuple[str, bytes]:
    """The name of a sample's image file in its folder, and its content from wherever the dataset reads it."""
    leaf, inner = resolve_sample(dataset, index)
    return leaf.img_infos[inner]["filename"], bytes(leaf.file_client.get(sample_paths(leaf, inner)[0]))


def make_evaluation_sample(index: int, sample: Any) -> EvaluationSample:
    """The views that a test pipeline has put into `img` and `img_metas`.

    Args:
        index: Of the image.
        sample: What the pipeline returned; lists where it makes several views.

    Raises:
        ConfigError: there is no image in it, or not what brings scores back to the image's own size.
    """
    if not isinstance(sample, Mapping) or not {"img", "img_metas"} <= set(sample):
        raise ConfigError("the test pipeline does not collect an image. End it with Collect(keys=['img']).")
    images, metas = sample["img"], sample["img_metas"]
    if not isinstance(images, list):
        images, metas = [images], [metas]
    views = [(unwrap(image)[None].float(), unwrap(meta)) for image, meta in zip(images, metas, strict=True)]
    needed = _OF_EACH_VIEW if len(views) == 1 else (*_OF_EACH_VIEW, *_OF_SEVERAL_VIEWS)
    lacking = [key for key in needed if any(key not in meta for _, meta in views)]
    if lacking:
        raise ConfigError(
            f"the test pipeline does not collect {' and '.join(lacking)} of its images. Leave meta_keys out of its "
            "Collect step, or name them there too."
        )
    return EvaluationSample(index, views)


class _TestViews(Dataset):
    """Test sample at an index, or the error that kept it from loading."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> EvaluationSample | DataError | ConfigError:
        with seeded_noise(0, index):  # a test pipeline may flip at random
            sample = load_or_error(self.dataset, index)
        try:
            return sample if isinstance(sample, DataError) else make_evaluation_sample(index, sample)
        except ConfigError as error:
            return error


def _first(items: list[Any]) -> Any:
    return items[0]
