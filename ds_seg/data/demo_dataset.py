"""The generated scenes as a dataset."""

from __future__ import annotations

from typing import Any, ClassVar

import ds_seg.openmmlab  # noqa: F401

from mmseg.datasets import DATASETS, CustomDataset  # isort: skip


@DATASETS.register_module()
class DemoScenesDataset(CustomDataset):
    """The scenes of `demo_scenes`; annotation id 0 is ignored, as in ADE20K."""

    CLASSES = ("sky", "grass", "water", "road", "building", "tree")
    PALETTE: ClassVar[list[list[int]]] = [
        [118, 180, 240],
        [122, 190, 74],
        [36, 92, 168],
        [140, 140, 140],
        [196, 84, 62],
        [24, 104, 44],
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(img_suffix=".jpg", seg_map_suffix=".png", reduce_zero_label=True, **kwargs)
