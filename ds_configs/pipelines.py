"""The training and the test pipeline that the datasets share: MMSegmentation steps, for one size of image and crop."""

from __future__ import annotations

from typing import Any

Steps = list[dict[str, Any]]

NORMALIZE = dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def train_pipeline(
    img_scale: tuple[int, int] | None,
    crop_px: int,
    *,
    reduce_zero_label: bool = False,
    ratio_range: tuple[float, float] = (0.5, 2.0),
    colours: bool = True,
) -> Steps:
    """Scaled, cropped, flipped and recoloured at random.

    Args:
        img_scale: (long, short) side in px that the ratio multiplies; None for the image's own size.
        crop_px: side of a crop, a multiple of the backbone's patch.
        reduce_zero_label: whether id 0 is ignored and id 1 is the first class.
        ratio_range: smallest and largest factor of `img_scale`.
        colours: whether brightness, contrast, saturation and hue change.
    """
    crop_size = (crop_px, crop_px)
    scale = dict(img_scale=img_scale) if img_scale else {}
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=reduce_zero_label),
        dict(type="Resize", ratio_range=ratio_range, **scale),
        dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        *([dict(type="PhotoMetricDistortion")] if colours else []),
        NORMALIZE,
        dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
        dict(type="DefaultFormatBundle"),
        dict(type="Collect", keys=["img", "gt_semantic_seg"]),
    ]


def test_pipeline(img_scale: tuple[int, int] | None, *resize: dict[str, Any]) -> Steps:
    """The whole image at one scale; `--tta` makes six scales of it, none below `keep_ratio`'s least, and mirror images.

    Args:
        img_scale: (long, short) side in px; None for the image's own size.
        resize: steps that lead from there to sides that are multiples of the backbone's patch.
    """
    scale = dict(img_scale=img_scale) if img_scale else dict(img_scale=None, img_ratios=[1.0])
    steps = [
        *resize,
        dict(type="RandomFlip"),
        NORMALIZE,
        dict(type="ImageToTensor", keys=["img"]),
        dict(type="Collect", keys=["img"]),
    ]
    return [dict(type="LoadImageFromFile"), dict(type="MultiScaleFlipAug", flip=False, transforms=steps, **scale)]


def keep_ratio(min_px: int | None = None) -> Steps:
    """Resize at the image's aspect ratio, its short side at least `min_px`, then to multiples of 14."""
    at_least = dict(min_size=min_px) if min_px else {}
    return [dict(type="Resize", keep_ratio=True, **at_least), dict(type="ResizeToMultiple", size_divisor=14)]
