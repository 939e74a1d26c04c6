"""`max_image_num`: a dataset that uses only so many of its images."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import ds_seg.openmmlab  # noqa: F401  (before mmseg)

from mmseg.datasets import DATASETS, ConcatDataset, CustomDataset  # isort: skip
from mmseg.datasets import build_dataset as build_mmseg_dataset  # isort: skip

_DRAW_SEED = 0


def limit_images(cfg: dict[str, Any]) -> None:
    """Let a dataset config with `max_image_num` build through `_build_few_images`, in place."""
    inner = dict(cfg)
    count = inner.pop("max_image_num")
    cfg.clear()
    cfg.update(type="FewImages", dataset_cfg=inner, max_image_num=count)


def draw_images(total: int, count: int) -> list[int]:
    """The images of a few-shot split: drawn once and for all, in the order of the files.

    Args:
        total: images there are.
        count: images wanted.

    Source: OpenGVLab/InternVL segmentation/mmseg_custom/datasets/ade.py, where the draw follows the run's seed: two
    runs of one config train on different images.
    """
    return sorted(random.Random(_DRAW_SEED).sample(range(total), min(count, total)))


@DATASETS.register_module(name="FewImages")
def _build_few_images(
    dataset_cfg: Mapping[str, Any], max_image_num: int, **default_args: Any
) -> CustomDataset | ConcatDataset:
    dataset = build_mmseg_dataset(dataset_cfg, default_args)
    for leaf in getattr(dataset, "datasets", [dataset]):  # several folders, if `img_dir` or `split` lists them
        leaf.img_infos = [leaf.img_infos[index] for index in draw_images(len(leaf.img_infos), max_image_num)]
    if isinstance(dataset, ConcatDataset):
        dataset.cumulative_sizes = dataset.cumsum(dataset.datasets)
    return dataset
