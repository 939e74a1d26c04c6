"""Evaluation of a whole dataset over all ranks, each image counted once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass

import numpy as np
from prettytable import PrettyTable

from ds_seg import distributed
from ds_seg.config.intervals import SCORES
from ds_seg.data.evaluation_samples import EvaluationSample
from ds_seg.errors import DsSegError
from ds_seg.evaluation.confusion import ConfusionMatrix
from ds_seg.evaluation.lockstep import EncodeDecode, InferenceSettings, Prediction, predict_images


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation measured, the same on every rank.

    Attributes:
        confusion: Over all images of all ranks.
        class_names: In the order of the class ids.
        images: Number of images counted.
        images_not_finite: Of them, those for which the network's scores are no numbers.
    """

    confusion: ConfusionMatrix
    class_names: tuple[str, ...]
    images: int
    images_not_finite: int = 0

    @property
    def mIoU(self) -> float:
        """Mean intersection over union, 0..1."""
        return self.confusion.mIoU

    @property
    def mAcc(self) -> float:
        """Mean accuracy of the classes, 0..1."""
        return self.confusion.mAcc

    @property
    def mDice(self) -> float:
        """Mean Dice score of the classes, 0..1."""
        return self.confusion.mDice

    @property
    def aAcc(self) -> float:
        """Accuracy over all pixels, 0..1."""
        return self.confusion.aAcc

    @property
    def iou(self) -> dict[str, float]:
        """Intersection over union by class, 0..1; NaN where a class was neither labelled nor predicted."""
        return dict(zip(self.class_names, self.confusion.iou, strict=True))

    @property
    def acc(self) -> dict[str, float]:
        """Accuracy by class, 0..1; NaN where a class was not labelled."""
        return dict(zip(self.class_names, self.confusion.acc, strict=True))

    def table(self) -> str:
        """Every class's IoU and accuracy and the means, in percent, as text."""
        classes = PrettyTable(["class", "IoU", "Acc"], align="r")
        classes.align["class"] = "l"
        for name, iou, acc in zip(self.class_names, self.confusion.iou, self.confusion.acc, strict=True):
            classes.add_row([name, _percent(iou), _percent(acc)])
        summary = PrettyTable(["images", *SCORES], align="r")
        summary.add_row([self.images, *(_percent(getattr(self, name)) for name in SCORES)])
        return f"{classes}\n{summary}"

    def describe_fault(self) -> str | None:
        """Why the scores mean nothing, in words; None where they do."""
        if not self.images_not_finite:
            return None
        return (
            f"the network's scores are not finite for {self.images_not_finite} of {self.images} images, and the mIoU "
            "means nothing: its weights have diverged"
        )

    def metrics(self) -> dict[str, float | None]:
        """The means as `eval/mIoU` and so on, and `eval/IoU/<class>`, 0..1; None for NaN, so that it is JSON."""
        values = {f"eval/{name}": getattr(self, name) for name in SCORES}
        values.update({f"eval/IoU/{name}": value for name, value in self.iou.items()})
        return {name: None if math.isnan(value) else value for name, value in values.items()}


def evaluate_dataset(
    dataset: Sized,
    samples: Iterable[EvaluationSample],
    encode_decode: EncodeDecode,
    settings: InferenceSettings,
    *,
    num_classes: int,
    class_names: Iterable[str],
    load_label: Callable[[int], np.ndarray],
    ignore_index: int = 255,
    on_prediction: Callable[[Prediction, np.ndarray], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Segment every image of a dataset over all ranks and count each one once. A sequence of collectives.

    Args:
        dataset: Only its length is used: the number of images that must have been counted.
        samples: This rank's share of the images.
        encode_decode: As for `predict_images`.
        settings: As for `predict_images`.
        num_classes: Classes in the ground truth (2 for a one-channel head).
        class_names: In the order of the class ids.
        load_label: Ground truth (H, W) of the image at a dataset index, at the image's own size.
        ignore_index: Label of the pixels to leave out.
        on_prediction: Called with each prediction of this rank and its ground truth; must issue no collective.
        progress: As for `predict_images`.

    Returns:
        The result over all ranks.

    Raises:
        DataError: an annotation doesn't fit its image or the classes.
        DsSegError: the ranks together did not see every image exactly once.
    """
    confusion = ConfusionMatrix(num_classes)
    seen: list[int] = []
    not_finite = 0
    for prediction in predict_images(samples, encode_decode, settings, progress):
        label_HW = load_label(prediction.index)
        source = str(prediction.meta.get("ori_filename") or prediction.meta.get("filename") or "")
        confusion.update(prediction.labels_HW, label_HW, ignore_index, source)
        seen.append(prediction.index)
        not_finite += not prediction.finite
        if on_prediction is not None:
            on_prediction(prediction, label_HW)
    confusion.reduce(settings.device)
    of_ranks = distributed.gather_objects((seen, not_finite))
    _validate_coverage([index for indices, _ in of_ranks for index in indices], len(dataset))
    names = tuple(class_names)
    assert len(names) == num_classes, f"{len(names)} class names for {num_classes} classes"
    return EvaluationResult(confusion, names, len(dataset), sum(count for _, count in of_ranks))


def _validate_coverage(indices: list[int], images: int) -> None:
    counts = Counter(indices)
    missing = [index for index in range(images) if index not in counts]
    repeated = [index for index, count in counts.items() if count > 1]
    if missing or repeated or len(indices) != images:
        raise DsSegError(
            f"Evaluation counted {len(indices)} images of a dataset of {images}: missing indices {missing[:5]}, "
            f"repeated {repeated[:5]}. The ranks' samples must split the dataset: index % world_size == rank."
        )


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
