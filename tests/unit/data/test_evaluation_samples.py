from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ds_seg.data.build import build_dataset
from ds_seg.data.evaluation_samples import load_evaluation_samples, load_ground_truth
from ds_seg.errors import ConfigError, DataError

MakeCfg = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_items_come_in_order_with_every_view(make_cfg: MakeCfg, num_workers: int) -> None:
    dataset = build_dataset(make_cfg("test"), role="test")
    samples = list(load_evaluation_samples(dataset, [5, 0, 3], num_workers=num_workers))
    assert [sample.index for sample in samples] == [5, 0, 3]
    for sample in samples:
        shapes = [tuple(image_13HW.shape) for image_13HW, _ in sample.views]
        assert shapes == [(1, 3, 42, 56), (1, 3, 42, 56), (1, 3, 21, 28), (1, 3, 21, 28)]
        assert [meta["flip"] for _, meta in sample.views] == [False, True, False, True]
        assert {meta["ori_filename"] for _, meta in sample.views} == {f"street_{sample.index}.jpg"}
        assert sample.views[0][0].dtype == torch.float32
        assert torch.equal(sample.views[0][0].flip(-1), sample.views[1][0])


def test_test_pipeline_without_augmentation_has_one_view(make_cfg: MakeCfg) -> None:
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"], "meta_keys": ("ori_shape", "img_shape")},
    ]
    (sample,) = load_evaluation_samples(build_dataset(make_cfg(pipeline=pipeline), role="test"), [1], num_workers=0)
    ((image_13HW, meta),) = sample.views
    assert (image_13HW.shape, image_13HW.dtype) == ((1, 3, 44, 60), torch.float32)
    assert meta == dict.fromkeys(("ori_shape", "img_shape"), (44, 60, 3))


def test_what_scores_need_must_be_collected(make_cfg: MakeCfg) -> None:
    def load(keys: tuple[str, ...]) -> None:
        cfg = copy.deepcopy(make_cfg("test"))
        cfg["pipeline"][1]["transforms"][-1]["meta_keys"] = keys
        list(load_evaluation_samples(build_dataset(cfg, role="test"), [0], num_workers=0))

    with pytest.raises(ConfigError, match=r"does not collect img_shape and flip_direction of its images\. Leave meta_"):
        load(("ori_shape", "flip"))
    load(("ori_shape", "img_shape", "flip", "flip_direction"))


def test_what_a_test_pipeline_draws_follows_from_the_image_alone(make_cfg: MakeCfg) -> None:
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img"], "meta_keys": ("ori_shape", "img_shape", "flip")},
    ]
    dataset = build_dataset(make_cfg(pipeline=pipeline), role="test")
    orders = ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0])
    first, second = (
        {s.index: s.views[0][1] for s in load_evaluation_samples(dataset, o, num_workers=0)} for o in orders
    )
    assert first == second and {meta["flip"] for meta in first.values()} == {True, False}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failing_test_items(make_cfg: MakeCfg, folder: Path, num_workers: int) -> None:
    path = folder / "images/train/street_4.jpg"
    path.write_bytes(b"")
    dataset = build_dataset(make_cfg("test"), role="test")
    with pytest.raises(DataError, match=rf"^image {path}: the file is empty\. Replace"):
        list(load_evaluation_samples(dataset, [0, 4], num_workers=num_workers))
    dataset = build_dataset(make_cfg(pipeline=[{"type": "LoadImageFromFile"}]), role="test")
    with pytest.raises(ConfigError, match=r"^the test pipeline does not collect an image\. End it with Collect"):
        list(load_evaluation_samples(dataset, [0], num_workers=num_workers))


@pytest.mark.parametrize("reduced_by_loader", [False, True])
def test_ground_truth_reduces_label_0_once(make_cfg: MakeCfg, folder: Path, reduced_by_loader: bool) -> None:
    label = (np.arange(44 * 60).reshape(44, 60) % 12).astype(np.uint8)
    label[0] = 255
    Image.fromarray(label).save(folder / "annotations/train/street_0.png")
    cfg = make_cfg("test", type="CustomDataset", reduce_zero_label=True, classes=[str(k) for k in range(11)])
    if reduced_by_loader:
        cfg["gt_seg_map_loader_cfg"] = {"reduce_zero_label": True}
    truth = load_ground_truth(build_dataset(cfg, role="test"), 0)
    assert truth.dtype == np.uint8
    expected = label.astype(int) - 1
    expected[(label == 0) | (label == 255)] = 255
    assert np.array_equal(truth, expected)


def test_ground_truth_as_it_is_and_through_wrappers(make_cfg: MakeCfg, folder: Path) -> None:
    label = np.array(Image.open(folder / "annotations/train/street_2.png"))
    dataset = build_dataset([make_cfg("test"), make_cfg("test")], role="test")
    assert np.array_equal(load_ground_truth(dataset, 7 + 2), label)


def test_ground_truth_that_cannot_be_used(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg("test"), role="test")
    path = folder / "annotations/train/street_0.png"
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"annotation {path} has shape \(10, 12\), but its image .* \(44, 60\)"):
        load_ground_truth(dataset, 0)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"annotation {path}: the file is empty"):
        load_ground_truth(dataset, 0)
    path.unlink()
    with pytest.raises(DataError, match=rf"annotation {path}: can't be read: No such file"):
        load_ground_truth(dataset, 0)
    unlabelled = build_dataset(make_cfg("test", ann_dir=None), role="test")
    with pytest.raises(DataError, match=r"street_0\.jpg can't be scored: its dataset has no ann_dir\. Set ann_dir"):
        load_ground_truth(unlabelled, 0)
