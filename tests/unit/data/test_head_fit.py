"""What is told of a dataset and a head that do not fit, before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ds_seg.data.build import build_dataset
from ds_seg.data.head_fit import find_misfits


def misfits(make_cfg: Any, *, num_classes: int = 11, ignored: int = 255, **changes: Any) -> list[str]:
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, *changes.pop("steps", [])]
    dataset = build_dataset(make_cfg("train", pipeline=pipeline, **changes), role="train")
    head = {"num_classes": num_classes, "ignore_index": ignored}
    return find_misfits("model.decode_head", head, "data.train", dataset)


def test_what_fits_is_not_told_of(make_cfg):
    assert misfits(make_cfg) == []
    assert misfits(make_cfg, steps=[{"type": "Pad", "size": (8, 8)}]) == []
    assert misfits(make_cfg, ignored=7, ignore_index=7, steps=[{"type": "Pad", "size": (8, 8), "seg_pad_val": 7}]) == []


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ({"num_classes": 12}, {}, r"num_classes is 12, but data\.train .* has 11 classes.*num_classes=11"),
        ({"num_classes": 1}, {"classes": ["road"]}, r"num_classes is 1: with no class beside 'road'.*=2\)"),
        (
            {"num_classes": 2},
            {"type": "CustomDataset", "classes": ["sky", "building"], "palette": [[1, 2, 3]]},
            r"data\.train\.palette has 1 colours for 2 classes",
        ),
        ({"ignored": 0}, {}, r"ignore_index is 0, but that of data\.train is 255"),
        (
            {"ignored": 100},
            {"ignore_index": 100, "steps": [{"type": "Pad", "size": (8, 8)}]},
            r"Pad fills labels with 255, .*nor the ignored id 100\. Set seg_pad_val=100",
        ),
        ({}, {"steps": [{"type": "RandomRotate", "prob": 1, "degree": 9, "seg_pad_val": 77}]}, r"RandomRotate .* 77"),
    ],
)
def test_what_does_not_fit_is_told_with_the_cure(make_cfg, head, changes, message):
    (found,) = misfits(make_cfg, **head, **changes)
    assert re.search(message, found), found


def test_padding_of_what_has_no_label_does_not_count(make_cfg):
    pad = [{"type": "LoadImageFromFile"}, {"type": "Pad", "size": (8, 8), "seg_pad_val": 77}]
    leaf = build_dataset(make_cfg("train", pipeline=pad), role="train")
    assert find_misfits("model.decode_head", {"num_classes": 11}, "data.test", leaf) == []
