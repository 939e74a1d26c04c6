"""EvaluationResult: its table, its JSON metrics and its agreement with the matrix."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ds_seg.evaluation.confusion import ConfusionMatrix
from ds_seg.evaluation.evaluate import EvaluationResult


@pytest.fixture
def result():
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[0, 0, 0, 1]]), np.array([[0, 0, 1, 1]]))
    return EvaluationResult(confusion, ("road", "sky", "tree"), 1)


def test_metrics_are_json_with_none_for_an_absent_class(result):
    metrics = result.metrics()

    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics == {
        "eval/mIoU": pytest.approx((2 / 3 + 1 / 2) / 2),
        "eval/mAcc": pytest.approx((1 + 1 / 2) / 2),
        "eval/mDice": pytest.approx((4 / 5 + 2 / 3) / 2),
        "eval/aAcc": 0.75,
        "eval/IoU/road": pytest.approx(2 / 3),
        "eval/IoU/sky": 0.5,
        "eval/IoU/tree": None,
    }


def test_classes_are_found_by_name(result):
    assert result.iou["sky"] == 0.5
    assert result.acc["road"] == 1.0


def test_the_table_is_in_percent_with_a_dash_for_an_absent_class(result):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.table().splitlines()]

    assert ["road", "66.67", "100.00"] in lines
    assert ["tree", "-", "-"] in lines
    assert ["1", "58.33", "75.00", "73.33", "75.00"] in lines
