"""One's own images and masks, in two folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ds_seg.openmmlab  # noqa: F401

from mmseg.datasets import DATASETS, CustomDataset  # isort: skip


@DATASETS.register_module()
class FoldersDataset(CustomDataset):
    """MMSeg's CustomDataset, whose `reduce_zero_label` holds for its pipeline too, so that the two can't differ.

    Args:
        pipeline: MMSeg pipeline.
        reduce_zero_label: Whether id 0 is ignored and id 1 is the first class.
        kwargs: Of CustomDataset; `classes` names the classes in the order of their ids.
    """

    def __init__(self, pipeline: Sequence[Mapping[str, Any]], reduce_zero_label: bool = False, **kwargs: Any) -> None:
        steps = [
            {**step, "reduce_zero_label": reduce_zero_label} if step["type"] == "LoadAnnotations" else step
            for step in pipeline
        ]
        super().__init__(pipeline=steps, reduce_zero_label=reduce_zero_label, **kwargs)
