"""A small CamVid-like folder of real files, made anew for each test that breaks it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

CROP = (28, 28)
TRAIN_PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "reduce_zero_label": False},
    {"type": "Resize", "img_scale": (60, 44), "ratio_range": (0.5, 2.0)},
    {"type": "RandomCrop", "crop_size": CROP, "cat_max_ratio": 0.75},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PhotoMetricDistortion"},
    {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True},
    {"type": "Pad", "size": CROP, "pad_val": 0, "seg_pad_val": 255},
    {"type": "DefaultFormatBundle"},
    {"type": "Collect", "keys": ["img", "gt_semantic_seg"]},
]
TEST_PIPELINE = [
    {"type": "LoadImageFromFile"},
    {
        "type": "MultiScaleFlipAug",
        "img_scale": (56, 42),
        "img_ratios": [1.0, 0.5],
        "flip": True,
        "transforms": [
            {"type": "Resize", "keep_ratio": False},
            {"type": "RandomFlip"},
            {"type": "Normalize", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "to_rgb": True},
            {"type": "ImageToTensor", "keys": ["img"]},
            {"type": "Collect", "keys": ["img"]},
        ],
    },
]


def write_pair(root: Path, name: str, *, width_px: int = 60, height_px: int = 44, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    label = cv2.resize(coarse[..., 0] % 11, (width_px, height_px), interpolation=cv2.INTER_NEAREST)
    label[:2] = 255
    for kind, suffix, content in (("images", ".jpg", image), ("annotations", ".png", label)):
        folder = root / kind / "train"
        folder.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"{name}{suffix}"), content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(7):
        write_pair(tmp_path, f"street_{index}", seed=index)
    return tmp_path


@pytest.fixture
def make_cfg(folder: Path) -> Callable[..., dict[str, Any]]:
    def make(role: str = "train", **changes: Any) -> dict[str, Any]:
        cfg = {
            "type": "CamVidDataset",
            "data_root": str(folder),
            "img_dir": "images/train",
            "ann_dir": "annotations/train",
            "pipeline": TRAIN_PIPELINE if role == "train" else TEST_PIPELINE,
        }
        return {**cfg, **changes}

    return make


@pytest.fixture
def camvid_root() -> Path:
    default = Path(__file__).parents[4] / "shared/data/camvid"
    root = Path(os.environ.get("CAMVID_ROOT", default))
    if not root.is_dir():
        pytest.skip(f"CamVid is not at {root}; set CAMVID_ROOT")
    return root
