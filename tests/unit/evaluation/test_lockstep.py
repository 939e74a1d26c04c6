"""Lockstep inference equals MMSeg's own slide, whole and augmented inference on images of any shape."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import ds_seg.openmmlab  # noqa: F401  mmseg needs it
from ds_seg import distributed
from ds_seg.errors import ConfigError, DataError, DsSegError
from ds_seg.evaluation.evaluate import evaluate_dataset
from ds_seg.evaluation.lockstep import InferenceSettings, predict_images

from mmcv import ConfigDict  # isort: skip
from mmcv.cnn import ConvModule  # isort: skip
from mmseg.core.evaluation import eval_metrics  # isort: skip
from mmseg.datasets import CustomDataset  # isort: skip
from mmseg.models import BACKBONES, HEADS, build_segmentor  # isort: skip
from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # isort: skip

CLASSES = ("road", "sky", "tree", "car", "sign")
SIZES = [(40, 150), (150, 40), (64, 64), (20, 22), (97, 203)]
SLIDE = {"mode": "slide", "crop_size": (48, 56), "stride": (33, 37)}


@BACKBONES.register_module(name="LockstepTestBackbone", force=True)
class TinyBackbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = ConvModule(3, 8, 3, stride=4, padding=1)

    def forward(self, image):
        return [self.conv(image)]


@HEADS.register_module(name="LockstepTestHead", force=True)
class TinyHead(BaseDecodeHead):
    def forward(self, inputs):
        return self.cls_seg(inputs[0])


def make_model(test_cfg, out_channels=5, align_corners=False):
    torch.manual_seed(0)
    head = {"type": "LockstepTestHead", "in_channels": 8, "channels": 8, "align_corners": align_corners}
    head |= {"num_classes": max(out_channels, 2), "out_channels": out_channels}
    head["loss_decode"] = {"type": "CrossEntropyLoss", "avg_non_ignore": True, "use_sigmoid": out_channels == 1}
    if out_channels == 1:
        head["threshold"] = 0.5
    cfg = {"type": "EncoderDecoder", "backbone": {"type": "LockstepTestBackbone"}, "decode_head": head}
    model = build_segmentor(cfg | {"test_cfg": ConfigDict(test_cfg)}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "img").mkdir()
    (root / "ann").mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "img" / f"{i}.jpg"), cv2.resize(coarse, (width, height)))
        label = rng.integers(0, len(CLASSES), (height, width), dtype=np.uint8)
        label[:3] = 255
        cv2.imwrite(str(root / "ann" / f"{i}.png"), label)
    return root


def make_dataset(folder, scales=((160, 64),), flip=False, directions=("horizontal",)):
    transforms = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", "mean": [120.0, 115.0, 100.0], "std": [60.0, 60.0, 60.0], "to_rgb": True},
        {"type": "Pad", "size_divisor": 8, "pad_val": 0},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    aug = {"type": "MultiScaleFlipAug", "img_scale": list(scales), "flip": flip, "transforms": transforms}
    pipeline = [{"type": "LoadImageFromFile"}, aug | {"flip_direction": list(directions)}]
    return CustomDataset(
        pipeline, folder / "img", ann_dir=folder / "ann", classes=CLASSES, palette=[[0, 0, 0]] * 5, test_mode=True
    )


def make_samples(dataset):
    for index in range(len(dataset)):
        item = dataset[index]
        metas = [meta.data for meta in item["img_metas"]]
        yield SimpleNamespace(
            index=index, views=[(image[None], meta) for image, meta in zip(item["img"], metas, strict=True)]
        )


def run_mmseg(model, sample):
    images = [image for image, _ in sample.views]
    metas = [[meta] for _, meta in sample.views]
    with torch.no_grad():
        if len(images) == 1:
            return model.simple_test(images[0], metas[0])[0]
        return model.aug_test(images, metas)[0]


def run_ours(model, dataset):
    options = {"test_cfg": dict(model.test_cfg), "in_channels": 3, "out_channels": model.out_channels}
    options |= {"align_corners": model.align_corners, "device": torch.device("cpu")}
    settings = InferenceSettings(window_batch=4, threshold=0.5, **options)
    return list(predict_images(make_samples(dataset), lambda image: model.encode_decode(image, None), settings))


@pytest.mark.filterwarnings("ignore:When align_corners=True")
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("test_cfg", [SLIDE, {"mode": "whole"}], ids=["slide", "whole"])
def test_labels_equal_mmsegs_simple_test(folder, test_cfg, align_corners):
    dataset, model = make_dataset(folder), make_model(test_cfg, align_corners=align_corners)

    predictions = run_ours(model, dataset)

    assert [p.index for p in predictions] == list(range(len(SIZES)))
    for prediction, sample in zip(predictions, make_samples(dataset), strict=True):
        theirs = run_mmseg(model, sample)
        assert prediction.labels_HW.shape == SIZES[prediction.index]
        assert len(np.unique(theirs)) > 1, "a constant map would not tell a wrong window"
        np.testing.assert_array_equal(prediction.labels_HW, theirs)


@pytest.mark.parametrize("directions", [("horizontal",), ("vertical",), ("horizontal", "vertical")])
def test_flips_and_scales_equal_mmsegs_aug_test(folder, directions):
    dataset = make_dataset(folder, scales=[(96, 40), (160, 64)], flip=True, directions=directions)
    model = make_model(SLIDE)

    for prediction, sample in zip(run_ours(model, dataset), make_samples(dataset), strict=True):
        np.testing.assert_array_equal(prediction.labels_HW, run_mmseg(model, sample))


def test_scores_equal_mmsegs_to_1e_6(folder):
    """Labels could hide a small error, so the scores are compared: largest difference measured 2.4e-7."""
    from ds_seg.evaluation import lockstep

    dataset, model = make_dataset(folder, flip=True), make_model(SLIDE)
    scores = []

    class Spy(lockstep._Image):
        def finish(self, settings):
            scores.append((self.scores_1KHW / self.views).numpy())
            return super().finish(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockstep, "_Image", Spy)
        run_ours(model, dataset)
    for ours, sample in zip(scores, make_samples(dataset), strict=True):
        images, metas = [image for image, _ in sample.views], [[meta] for _, meta in sample.views]
        with torch.no_grad():
            theirs = model.aug_test_logits(images, metas)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_a_one_channel_head_is_split_at_the_threshold(folder):
    dataset, model = make_dataset(folder), make_model(SLIDE, out_channels=1)

    for prediction, sample in zip(run_ours(model, dataset), make_samples(dataset), strict=True):
        np.testing.assert_array_equal(prediction.labels_HW, run_mmseg(model, sample))


def test_evaluation_equals_mmsegs_evaluate(folder):
    dataset, model = make_dataset(folder), make_model(SLIDE)
    seen = []
    result = evaluate_dataset(
        dataset,
        make_samples(dataset),
        lambda image: model.encode_decode(image, None),
        make_settings(test_cfg=SLIDE, window_batch=3),
        num_classes=5,
        class_names=CLASSES,
        load_label=dataset.get_gt_seg_map_by_idx,
        on_prediction=lambda prediction, label: seen.append((prediction.index, label.shape)),
    )

    labels = [run_mmseg(model, sample) for sample in make_samples(dataset)]
    exact = eval_metrics(labels, dataset.get_gt_seg_maps(), 5, 255)
    assert result.mIoU == pytest.approx(np.nanmean(exact["IoU"]), abs=1e-6)
    assert result.mAcc == pytest.approx(np.nanmean(exact["Acc"]), abs=1e-6)
    assert result.aAcc == pytest.approx(float(exact["aAcc"]), abs=1e-6)
    rounded = dataset.evaluate(labels, logger="silent")  # MMSeg rounds to 0.01 percent
    for name, value in {"mIoU": result.mIoU, "mAcc": result.mAcc, "aAcc": result.aAcc}.items():
        assert rounded[name] == pytest.approx(round(value * 100, 2) / 100, abs=1e-6)
    for name in CLASSES:
        assert rounded[f"IoU.{name}"] == pytest.approx(round(result.iou[name] * 100, 2) / 100, abs=1e-6)
    assert seen == list(enumerate(SIZES))


def test_a_batch_takes_windows_of_the_next_image_only_if_they_have_its_size(folder):
    dataset, model = make_dataset(folder), make_model(SLIDE)
    shapes, done = [], []

    def encode_decode(image):
        shapes.append(tuple(image.shape))
        return model.encode_decode(image, None)

    settings = make_settings(test_cfg=SLIDE, window_batch=64)
    list(predict_images(make_samples(dataset), encode_decode, settings, progress=done.append))

    assert len(shapes) < len(SIZES), "windows of equal size were not batched across images"
    assert len({shape[2:] for shape in shapes}) > 1
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "test_cfg",
    [
        {"mode": "slid"},
        {"mode": "slide", "crop_size": (4, 4)},
        {"mode": "slide", "crop_size": (4, 4), "stride": 4},
        {"mode": "slide", "crop_size": (4, 4, 4), "stride": (4, 4)},
        {},
    ],
)
def test_an_unusable_test_cfg_is_refused(test_cfg):
    with pytest.raises(ConfigError, match=r"model\.test_cfg is .*wanted dict\(mode='whole'\) or dict\(mode='slide'"):
        next(predict_images([], torch.nn.Identity(), make_settings(test_cfg=test_cfg)))


def test_an_empty_window_batch_is_refused():
    with pytest.raises(ConfigError, match="window batch is 0; it must be at least 1"):
        next(predict_images([], torch.nn.Identity(), make_settings(window_batch=0)))


def test_logits_of_another_shape_are_our_own_fault():
    meta = {"img_shape": (8, 8, 3), "ori_shape": (8, 8, 3)}
    sample = SimpleNamespace(index=0, views=[(torch.zeros(1, 3, 8, 8), meta)])
    with pytest.raises(AssertionError, match=r"encode_decode returned \(1, 3, 8, 8\), wanted \(1, 5, 8, 8\)"):
        list(predict_images([sample], torch.nn.Identity(), make_settings()))


def test_a_rank_without_windows_runs_one_of_zeros_in_the_smallest_size_and_drops_the_result(monkeypatch):
    of_others, images = iter([torch.tensor([-8, -12, 0]), None]), []
    monkeypatch.setattr(distributed, "reduce_max", lambda own: own if (other := next(of_others)) is None else other)

    def encode_decode(images_BCHW):
        images.append(images_BCHW)
        return images_BCHW[:, :1].expand(-1, 5, -1, -1)

    assert list(predict_images([], encode_decode, make_settings())) == []
    assert [tuple(image.shape) for image in images] == [(1, 3, 8, 12)] and not images[0].any()


def test_no_thread_is_left_by_a_failure():
    meta = {"img_shape": (8, 8, 3), "ori_shape": (8, 8, 3)}
    samples = [SimpleNamespace(index=0, views=[(torch.zeros(1, 3, 8, 8), meta)])] * 3
    before = set(threading.enumerate())
    with pytest.raises(AssertionError):
        list(predict_images(samples, torch.nn.Identity(), make_settings()))
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


def test_images_whose_scores_are_no_numbers_are_counted():
    meta = {"img_shape": (8, 8, 3), "ori_shape": (8, 8, 3)}
    images = [torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)]
    samples = [SimpleNamespace(index=i, views=[(image, meta)]) for i, image in enumerate(images)]
    result = run_evaluation(samples, lambda _: np.zeros((8, 8), np.uint8))
    assert result.images_not_finite == 1 and "not finite for 1 of 2 images" in result.describe_fault()
    fine = [SimpleNamespace(index=i, views=[(images[0], meta)]) for i in range(2)]
    assert run_evaluation(fine, lambda _: np.zeros((8, 8), np.uint8)).describe_fault() is None


@pytest.mark.parametrize(("indices", "message"), [([0], r"missing indices \[1\]"), ([0, 1, 1], r"repeated \[1\]")])
def test_every_image_must_be_counted_once(indices, message):
    meta = {"img_shape": (8, 8, 3), "ori_shape": (8, 8, 3)}
    samples = [SimpleNamespace(index=i, views=[(torch.zeros(1, 3, 8, 8), meta)]) for i in indices]
    with pytest.raises(DsSegError, match=message + ".*index % world_size == rank"):
        run_evaluation(samples, lambda _: np.zeros((8, 8), np.uint8))


def test_a_wrong_label_is_an_error_that_names_the_file():
    meta = {"img_shape": (8, 8, 3), "ori_shape": (8, 8, 3), "ori_filename": "scene_7.jpg"}
    sample = SimpleNamespace(index=0, views=[(torch.zeros(1, 3, 8, 8), meta)])
    with pytest.raises(DataError, match=r"ground truth of scene_7\.jpg holds the ids \[12\]"):
        run_evaluation([sample], lambda _: np.full((8, 8), 12))


def make_settings(**changes):
    options = {"test_cfg": {"mode": "whole"}, "in_channels": 3, "out_channels": 5, "align_corners": False}
    return InferenceSettings(**(options | {"window_batch": 1, "device": torch.device("cpu")} | changes))


def run_evaluation(samples, load_label):
    return evaluate_dataset(
        range(2),
        samples,
        lambda image: image[:, :1].expand(-1, 5, -1, -1),
        make_settings(),
        num_classes=5,
        class_names=CLASSES,
        load_label=load_label,
    )
