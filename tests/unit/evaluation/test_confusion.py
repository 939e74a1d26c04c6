"""The confusion matrix: MMSeg's metrics, exact beyond float32, and the messages for labels that can't be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ds_seg.openmmlab  # noqa: F401  mmseg needs it
from ds_seg.errors import DataError
from ds_seg.evaluation.confusion import ConfusionMatrix

from mmseg.core.evaluation import eval_metrics  # isort: skip


def make_maps(seed, num_classes=7, absent=(3, 5)):
    """Three pairs; class 3 is in no map at all, class 5 is predicted but never labelled."""
    rng = np.random.default_rng(seed)
    pairs = []
    for shape in [(20, 31), (64, 5), (11, 11)]:
        label = rng.integers(0, num_classes, shape).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.6, label, rng.integers(0, num_classes, shape)).astype(np.int64)
        label[np.isin(label, absent)] = 0
        prediction[prediction == 3] = 1
        label[rng.random(shape) < 0.1] = 255
        pairs.append((prediction, label))
    return pairs


def test_metrics_equal_mmsegs_to_float64_rounding():
    pairs = make_maps(0)
    confusion = ConfusionMatrix(7)
    for prediction, label in pairs:
        confusion.update(prediction, label, 255)

    predictions, labels = zip(*pairs, strict=True)
    theirs = eval_metrics(predictions, labels, 7, 255, metrics=["mIoU", "mDice"])
    np.testing.assert_allclose(confusion.iou, theirs["IoU"], rtol=1e-12)
    np.testing.assert_allclose(confusion.acc, theirs["Acc"], rtol=1e-12)
    assert confusion.aAcc == pytest.approx(float(theirs["aAcc"]), rel=1e-12)
    assert confusion.mIoU == pytest.approx(np.nanmean(theirs["IoU"]), rel=1e-12)
    assert confusion.mAcc == pytest.approx(np.nanmean(theirs["Acc"]), rel=1e-12)
    assert confusion.mDice == pytest.approx(np.nanmean(theirs["Dice"]), rel=1e-12)
    assert math.isnan(confusion.iou[3])
    assert confusion.iou[5] == 0.0
    assert math.isnan(confusion.acc[5])


def test_what_is_predicted_on_ignored_pixels_counts_nowhere():
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([[0, 1, 77]]), np.array([[0, 255, 255]]), 255)

    assert confusion.counts_KK.tolist() == [[1, 0], [0, 0]]


def test_rows_are_ground_truth_and_columns_predictions():
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[2]]), np.array([[0]]))

    assert confusion.counts_KK[0, 2] == 1


def test_counts_stay_exact_where_float32_sums_lose_pixels():
    confusion = ConfusionMatrix(2)
    confusion.counts_KK[0, 0] = 2**24
    confusion.update(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))

    assert confusion.counts_KK[0, 0].item() == 2**24 + 1  # a tensor compares in its own dtype, in float32 with 2**24
    assert (torch.tensor(2.0**24) + 1).item() == 2**24


def test_without_labelled_pixels_the_means_are_nan():
    confusion = ConfusionMatrix(2)
    confusion.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))

    assert math.isnan(confusion.mIoU)
    assert math.isnan(confusion.aAcc)


def test_a_label_outside_the_classes_is_an_error_that_names_file_and_id():
    with pytest.raises(DataError, match=r"ground truth of a\.png holds the ids \[7, 9\], outside the classes 0\.\.2"):
        ConfusionMatrix(3).update(np.zeros((1, 3), np.uint8), np.array([[9, 1, 7]]), 255, "a.png")


def test_another_size_is_an_error():
    with pytest.raises(DataError, match=r"ground truth of a\.png is 2x3 px, its prediction 3x2 px"):
        ConfusionMatrix(3).update(np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.uint8), 255, "a.png")


def test_a_predicted_id_outside_the_classes_is_our_own_fault():
    with pytest.raises(AssertionError, match=r"predicted ids 3\.\.3 of 3 classes"):
        ConfusionMatrix(3).update(np.array([[3]]), np.array([[0]]))
