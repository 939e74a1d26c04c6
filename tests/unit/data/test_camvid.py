from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ds_seg.data.build import build_dataset
from ds_seg.data.camvid import CamVidDataset
from ds_seg.data.evaluation_samples import load_evaluation_samples, load_ground_truth
from ds_seg.data.lint import validate_annotations
from ds_seg.data.training_batches import build_train_loader

from mmcv import Config  # isort: skip

CONFIGS = Path(__file__).parents[3] / "ds_configs/datasets"


def test_classes_and_palette() -> None:
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert " ".join(CamVidDataset.CLASSES) == names
    assert len({tuple(colour) for colour in CamVidDataset.PALETTE}) == 11


def test_environment_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", "/elsewhere/camvid")
    cfg = Config.fromfile(str(CONFIGS / "camvid.py"))
    assert {cfg.data[role].data_root for role in ("train", "val", "test")} == {"/elsewhere/camvid"}
    monkeypatch.delenv("CAMVID_ROOT")
    default = Config.fromfile(str(CONFIGS / "camvid.py")).data.train.data_root
    assert Path(default) == CONFIGS.parents[2] / "shared/data/camvid"


def test_ade20k_config_names_its_folder_and_keeps_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADE20K_ROOT", "/elsewhere/ade")
    cfg = Config.fromfile(str(CONFIGS / "ade20k_504.py"))
    assert {cfg.data[role].data_root for role in ("train", "val", "test")} == {"/elsewhere/ade"}
    steps = {step.type: step for step in cfg.data.train.pipeline}
    assert (steps["Resize"].img_scale, steps["Resize"].ratio_range) == ((2016, 504), (0.5, 2.0))
    assert (tuple(steps["RandomCrop"].crop_size), steps["RandomCrop"].cat_max_ratio) == ((504, 504), 0.75)
    assert steps["Pad"].seg_pad_val == 255
    assert cfg.data.test.pipeline[1].transforms[1] == {"type": "ResizeToMultiple", "size_divisor": 14}


def test_camvid_loads_trains_and_scores(camvid_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", str(camvid_root))
    cfg = Config.fromfile(str(CONFIGS / "camvid.py"))
    train, val = build_dataset(cfg.data.train, role="train"), build_dataset(cfg.data.val, role="val")
    assert (len(train), len(val)) == (367, 101)
    stream = build_train_loader(
        train, seed=0, micro_batch=4, accumulation_steps=1, rank=0, world_size=1, stop_step=1, num_workers=0
    )
    batch = next(stream)
    assert batch.images_B3HW.shape == (4, 3, 252, 252)
    assert set(np.unique(batch.labels_B1HW)) <= {*range(11), 255}
    (sample,) = load_evaluation_samples(val, [100], num_workers=0)
    (image_13HW, meta) = sample.views[0]
    assert image_13HW.shape == (1, 3, 364, 490)
    assert meta["ori_shape"][:2] == load_ground_truth(val, 100).shape == (360, 480)


def test_camvid_is_clean_and_checked_fast(camvid_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", str(camvid_root))
    train = build_dataset(Config.fromfile(str(CONFIGS / "camvid.py")).data.train, role="train")
    start = time.process_time()
    validate_annotations(train, num_classes=11, rank=0, world_size=1, threads=2, progress=False)
    assert len(train) / (time.process_time() - start) > 200  # pairs a second of processor time
