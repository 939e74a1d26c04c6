"""The images that a dataset uses: those that its split file names, and `max_image_num` of them."""

from __future__ import annotations

import codecs
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ds_seg.openmmlab  # noqa: F401  (before mmseg)

from mmseg.datasets import DATASETS, ConcatDataset, CustomDataset  # isort: skip
from mmseg.datasets import build_dataset as build_mmseg_dataset  # isort: skip

_DRAW_SEED = 0
_BYTE_ORDER_MARK = "\ufeff"


def build_through_lists(cfg: dict[str, Any]) -> None:
    """Let a dataset config with a split file or `max_image_num` build through `_build_listed_images`, in place."""
    inner = dict(cfg)
    count = inner.pop("max_image_num", None)
    cfg.clear()
    if count is None and not inner.get("split"):
        cfg.update(inner)
    else:
        cfg.update(type="ListedImages", dataset_cfg=inner, max_image_num=count)


def find_encoding_fault(path: Path) -> str | None:
    """What is wrong with the text of a split file that is not UTF-8, and the cure; None too if it can't be opened."""
    try:
        content = path.read_bytes()
        content.decode()
    except OSError:
        return None
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return f"{path} is UTF-16 text, as PowerShell's > writes it. Save it as UTF-8 (Out-File -Encoding utf8)."
        line = content[: error.start].count(b"\n") + 1
        return f"line {line} of {path} is not UTF-8 text. Save the file as UTF-8."
    return None


def draw_images(total: int, count: int) -> list[int]:
    """The images of a few-shot split: drawn once and for all, in the order of the files.

    Args:
        total: images there are.
        count: images wanted.

    Source: OpenGVLab/InternVL segmentation/mmseg_custom/datasets/ade.py, where the draw follows the run's seed: two
    runs of one config train on different images.
    """
    return sorted(random.Random(_DRAW_SEED).sample(range(total), min(count, total)))


@DATASETS.register_module(name="ListedImages")
def _build_listed_images(
    dataset_cfg: Mapping[str, Any], max_image_num: int | None, **default_args: Any
) -> CustomDataset | ConcatDataset:
    dataset = build_mmseg_dataset(dataset_cfg, default_args)
    for leaf in getattr(dataset, "datasets", [dataset]):  # several folders, if `img_dir` or `split` lists them
        if leaf.split:
            _mend_names(leaf)
        if max_image_num is not None:
            leaf.img_infos = [leaf.img_infos[index] for index in draw_images(len(leaf.img_infos), max_image_num)]
    if isinstance(dataset, ConcatDataset):
        dataset.cumulative_sizes = dataset.cumsum(dataset.datasets)
    return dataset


def _mend_names(leaf: CustomDataset) -> None:
    """Drop blank lines and the byte order mark, which MMSeg 0.30 takes for names and for a part of the first one."""
    for info in leaf.img_infos[:1]:
        info["filename"] = info["filename"].removeprefix(_BYTE_ORDER_MARK)
        if "ann" in info:
            info["ann"]["seg_map"] = info["ann"]["seg_map"].removeprefix(_BYTE_ORDER_MARK)
    leaf.img_infos = [info for info in leaf.img_infos if info["filename"] != leaf.img_suffix]
