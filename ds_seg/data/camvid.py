"""CamVid in the split and the 11 classes of the SegNet tutorial."""

from __future__ import annotations

from typing import Any, ClassVar

import ds_seg.openmmlab  # noqa: F401

from mmseg.datasets import DATASETS, CustomDataset  # isort: skip


@DATASETS.register_module()
class CamVidDataset(CustomDataset):
    """CamVid street scenes: ids 0..10 are the classes below in order, 255 is ignored.

    The folder holds images/{train,val}/*.jpg and annotations/{train,val}/*.png.
    """

    CLASSES = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    PALETTE: ClassVar[list[list[int]]] = [
        [128, 128, 128],
        [128, 0, 0],
        [192, 192, 128],
        [128, 64, 128],
        [60, 40, 222],
        [128, 128, 0],
        [192, 128, 128],
        [64, 64, 128],
        [64, 0, 128],
        [64, 64, 0],
        [0, 128, 192],
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(img_suffix=".jpg", seg_map_suffix=".png", reduce_zero_label=False, **kwargs)
