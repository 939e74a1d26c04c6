"""Crops without a labelled pixel: losses of MMSegmentation 0.30 that raise or turn NaN on them give 0 instead.

A crop of step k is the same after every resume, so a run that a crop ends could never go on. With any other crop
the functions below are MMSegmentation's own.

Shape legend: B images, K classes, H and W pixels, P labelled pixels.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

import ds_seg.openmmlab  # noqa: F401  (before mmseg)

_lovasz: Any = importlib.import_module("mmseg.models.losses.lovasz_loss")
_cross_entropy: Any = importlib.import_module("mmseg.models.losses.cross_entropy_loss")
_flatten_probs = _lovasz.flatten_probs
_lovasz_softmax_flat = _lovasz.lovasz_softmax_flat
_binary_cross_entropy = _cross_entropy.binary_cross_entropy


@functools.wraps(_flatten_probs)
def flatten_probs(probs: Tensor, labels: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities (P, K) and labels (P,) of the labelled pixels; MMSegmentation's are (K,) where P is 1."""
    probs, labels = _flatten_probs(probs, labels, ignore_index)
    return (probs[None] if probs.dim() == 1 else probs), labels


@functools.wraps(_lovasz_softmax_flat)
def lovasz_softmax_flat(probs: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The Lovasz-Softmax loss, a scalar also where P is 0; MMSegmentation's is an empty (0, K) there."""
    return _lovasz_softmax_flat(probs, labels, *args, **kwargs) if len(labels) else probs.sum()


@functools.wraps(_binary_cross_entropy)
def binary_cross_entropy(
    pred: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *args: Any,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Binary cross-entropy; MMSegmentation takes the largest label of none where (B, 1, H, W) has no labelled pixel."""
    if pred.size(1) == 1 and not (label != ignore_index).any():
        zeros_BHW = pred.squeeze(1) * 0
        return zeros_BHW if reduction == "none" else zeros_BHW.sum()
    return _binary_cross_entropy(pred, label, weight, reduction, *args, ignore_index=ignore_index, **kwargs)


_lovasz.flatten_probs = flatten_probs
_lovasz.lovasz_softmax_flat = lovasz_softmax_flat
_cross_entropy.binary_cross_entropy = binary_cross_entropy
