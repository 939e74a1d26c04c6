"""MMSegmentation 0.30's FocalLoss on GPUs without mmcv's compiled operators: its own formula for CPUs.

Shape legend: P pixels, K classes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from ds_seg.openmmlab import has_compiled_ops

_focal: Any = importlib.import_module("mmseg.models.losses.focal_loss")


@functools.wraps(_focal.sigmoid_focal_loss)
def sigmoid_focal_loss(pred: Tensor, _target: Tensor, one_hot_target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of scores (P, K) and labels as 0 and 1 (P, K); MMSegmentation gives an operator of mmcv the ids (P,)."""
    return _focal.py_sigmoid_focal_loss(pred, one_hot_target, None, *args, **kwargs)


if not has_compiled_ops():
    _focal.sigmoid_focal_loss = sigmoid_focal_loss
