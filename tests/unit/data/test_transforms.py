import numpy as np
import pytest

import ds_seg.data.transforms  # noqa: F401

from mmseg.datasets import PIPELINES  # isort: skip


def picture(height_px, width_px):
    return {
        "img": np.arange(height_px * width_px * 3).reshape(height_px, width_px, 3).astype(np.uint8),
        "gt_semantic_seg": np.zeros((height_px, width_px), np.uint8),
        "seg_fields": ["gt_semantic_seg"],
        "img_shape": (height_px, width_px, 3),
    }


def build(name, **kwargs):
    return PIPELINES.get(name)(**kwargs)


@pytest.mark.parametrize(("height_px", "width_px", "want"), [(30, 60, (56, 112)), (90, 45, (112, 56))])
def test_setr_resize_keeps_the_short_side_as_long_as_the_crop(height_px, width_px, want):
    step = build("SETR_Resize", img_scale=(80, 28), keep_ratio=True, crop_size=(56, 56), setr_multi_scale=True)
    out = step(picture(height_px, width_px))
    assert out["img"].shape[:2] == out["gt_semantic_seg"].shape == want


def test_setr_resize_without_multi_scale_is_mmsegs_resize():
    step = build("SETR_Resize", img_scale=(80, 28), crop_size=(56, 56))
    assert step(picture(30, 60))["img"].shape == build("Resize", img_scale=(80, 28))(picture(30, 60))["img"].shape
    assert step.min_size is None and step.keep_ratio


def test_setr_resize_needs_a_crop_for_multi_scale():
    with pytest.raises(ValueError, match=r"setr_multi_scale=True needs crop_size"):
        build("SETR_Resize", setr_multi_scale=True)


def test_pad_short_side_pads_right_and_bottom_and_leaves_the_shape_of_the_picture():
    before = picture(20, 40)
    image = before["img"].copy()
    out = build("PadShortSide", size=28, pad_val=7)(before)
    assert out["img"].shape == out["pad_shape"] == (28, 40, 3) and out["img_shape"] == (20, 40, 3)
    assert (out["img"][:20] == image).all() and (out["img"][20:] == 7).all()
    assert (out["gt_semantic_seg"][:20] == 0).all() and (out["gt_semantic_seg"][20:] == 255).all()


def test_pad_short_side_leaves_what_is_long_enough():
    assert build("PadShortSide", size=20)(picture(20, 40))["img"].shape == (20, 40, 3)


def test_resize_to_multiple_is_mmsegs():
    assert build("ResizeToMultiple", size_divisor=14)(picture(30, 60))["img"].shape == (42, 70, 3)
