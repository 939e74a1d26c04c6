"""The int64 confusion matrix and the metrics that MMSegmentation defines on it.

Shape suffixes: H, W pixels; K classes.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_seg import distributed
from ds_seg.errors import DataError


class ConfusionMatrix:
    """Pixels counted by ground truth (rows) and prediction (columns).

    int64 counts add up exactly in any order, so the result doesn't depend on how many ranks share the images.

    Attributes:
        counts_KK: int64, on the CPU.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(
        self, prediction_HW: np.ndarray, label_HW: np.ndarray, ignore_index: int = 255, source: str = ""
    ) -> None:
        """Count one image; pixels whose ground truth is `ignore_index` count nowhere, whatever was predicted there.

        Args:
            prediction_HW: Class ids, any integer dtype, 0..K-1 wherever the label is not ignored.
            label_HW: Class ids, any integer dtype, 0..K-1 or `ignore_index`.
            ignore_index: Label of the pixels to leave out.
            source: The file of the label, for messages.

        Raises:
            DataError: the shapes differ or the label holds an id that is no class.
        """
        where = f" of {source}" if source else ""
        if prediction_HW.shape != label_HW.shape:
            raise DataError(
                f"The ground truth{where} is {_size(label_HW)} px, its prediction {_size(prediction_HW)} px. "
                "The annotation must have the size of its image."
            )
        kept = label_HW != ignore_index
        labels, predictions = label_HW[kept].astype(np.int64), prediction_HW[kept].astype(np.int64)
        strange = np.unique(labels[(labels < 0) | (labels >= self.num_classes)]).tolist()
        if strange:
            raise DataError(
                f"The ground truth{where} holds the ids {strange[:10]}, outside the classes 0..{self.num_classes - 1} "
                f"and not the ignored id {ignore_index}. Fix the annotation, the dataset's classes, "
                "or its reduce_zero_label."
            )
        assert predictions.size == 0 or 0 <= predictions.min() <= predictions.max() < self.num_classes, (
            f"predicted ids {predictions.min()}..{predictions.max()} of {self.num_classes} classes"
        )
        counts = np.bincount(labels * self.num_classes + predictions, minlength=self.num_classes**2)
        self.counts_KK += torch.from_numpy(counts.reshape(self.num_classes, self.num_classes))

    def reduce(self, device: torch.device) -> None:
        """Sum over ranks, in int64. A collective: every rank calls it."""
        self.counts_KK = distributed.reduce_sum(self.counts_KK.to(device))

    @property
    def iou(self) -> list[float]:
        """Intersection over union of each class; NaN where it is neither in a label nor predicted."""
        hits_K = self.counts_KK.diagonal().double()
        return (hits_K / (self.counts_KK.sum(0) + self.counts_KK.sum(1) - hits_K)).tolist()

    @property
    def acc(self) -> list[float]:
        """Share of each class's labelled pixels that was found; NaN where it has none."""
        return (self.counts_KK.diagonal().double() / self.counts_KK.sum(1)).tolist()

    @property
    def mIoU(self) -> float:
        """Mean of `iou` over the classes that have one; NaN if none does."""
        return torch.tensor(self.iou, dtype=torch.float64).nanmean().item()

    @property
    def mAcc(self) -> float:
        """Mean of `acc` over the classes that have one; NaN if none does."""
        return torch.tensor(self.acc, dtype=torch.float64).nanmean().item()

    @property
    def mDice(self) -> float:
        """Mean Dice score (F-score of beta 1) over the classes that have one; NaN if none does."""
        hits_K = self.counts_KK.diagonal().double()
        return (2 * hits_K / (self.counts_KK.sum(0) + self.counts_KK.sum(1))).nanmean().item()

    @property
    def aAcc(self) -> float:
        """Share of all labelled pixels that is right; NaN if nothing is labelled."""
        return (self.counts_KK.diagonal().sum().double() / self.counts_KK.sum()).item()


def _size(array_HW: np.ndarray) -> str:
    return "x".join(map(str, array_HW.shape))
