"""Pipeline steps that configs of InternVL's segmentation folder name and MMSegmentation 0.30 does not have.

Shape legend: H and W are an image's height and width in px.
"""

from __future__ import annotations

from typing import Any

import ds_seg.openmmlab  # noqa: F401  (before mmcv)

import mmcv  # isort: skip
from mmseg.datasets import PIPELINES  # isort: skip
from mmseg.datasets.pipelines import Resize  # isort: skip


@PIPELINES.register_module(name="SETR_Resize")
class SetrResize(Resize):
    """MMSeg's Resize, which may keep the short side at least as long as a crop.

    Args:
        crop_size: (height, width) of a crop in px; only the height counts.
        setr_multi_scale: Whether the short side is kept at least that long, at the image's own aspect ratio.
        kwargs: Of Resize.

    Source: OpenGVLab/InternVL segmentation/mmseg_custom/datasets/pipelines/transform.py. What differs: it is the
    `min_size` that Resize has had since.
    """

    def __init__(
        self, *args: Any, crop_size: tuple[int, int] | None = None, setr_multi_scale: bool = False, **kwargs: Any
    ) -> None:
        if setr_multi_scale:
            if crop_size is None:
                raise ValueError("SETR_Resize with setr_multi_scale=True needs crop_size=(height, width)")
            kwargs["min_size"] = crop_size[0]
        super().__init__(*args, **kwargs)


@PIPELINES.register_module()
class PadShortSide:
    """Pad sides that are too short, on the right and at the bottom.

    `img_shape` stays that of the picture, so that evaluation cuts the padding off again.

    Args:
        size: Shortest length of a side in px.
        pad_val: Value of new pixels in every channel, in the image's units at this place of the pipeline.
        seg_pad_val: Class id of new pixels.

    Source: OpenGVLab/InternVL segmentation/mmseg_custom/datasets/pipelines/transform.py. What differs: `pad_val` is
    for all three channels, not for the first one alone.
    """

    def __init__(self, size: int, pad_val: float = 0, seg_pad_val: int = 255) -> None:
        self.size, self.pad_val, self.seg_pad_val = size, pad_val, seg_pad_val

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pad the image and its annotations, if it has any."""
        shape_HW = tuple(max(length, self.size) for length in results["img"].shape[:2])
        results["img"] = mmcv.impad(results["img"], shape=shape_HW, pad_val=(self.pad_val,) * 3)
        results["pad_shape"] = results["img"].shape
        for key in results.get("seg_fields", []):
            results[key] = mmcv.impad(results[key], shape=shape_HW, pad_val=self.seg_pad_val)
        return results

    def __repr__(self) -> str:
        return f"PadShortSide(size={self.size}, pad_val={self.pad_val}, seg_pad_val={self.seg_pad_val})"
