"""An evaluation that also hands a few predictions on as pictures."""

from __future__ import annotations

import contextlib

import numpy as np

from ds_seg import distributed
from ds_seg.data.evaluation_samples import load_image_file
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.evaluation.evaluate import EvaluationResult
from ds_seg.evaluation.lockstep import Prediction
from ds_seg.evaluation.pictures import Picture, decode_rgb, name_picture
from ds_seg.session import Evaluator
from ds_seg.tracking.tracker import Tracker

PICTURES = 8


class PredictingEvaluator:
    """Evaluates, and gives the tracker the same few images each time: of the main rank's share, evenly spread.

    Where there are averages of the weights, it is they that are evaluated.
    """

    def __init__(
        self, evaluator: Evaluator, engines: Engines, tracker: Tracker, ema: WeightAverages | None = None
    ) -> None:
        self.evaluator, self.engines, self.tracker, self.ema = evaluator, engines, tracker, ema
        own = range(0, len(evaluator.dataset), distributed.world_size())
        self.indices = {own[place] for place in np.linspace(0, len(own) - 1, min(PICTURES, len(own)), dtype=int)}

    def __call__(self, step: int) -> EvaluationResult:
        """Evaluate after `step` steps; a collective over all ranks."""
        pictures: list[Picture] = []

        def keep(prediction: Prediction, label_HW: np.ndarray) -> None:
            if distributed.is_main() and prediction.index in self.indices:
                name, content = load_image_file(self.evaluator.dataset, prediction.index)
                image_HW3 = decode_rgb(content, name)
                pictures.append((name_picture(name), image_HW3, prediction.labels_HW, label_HW))

        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            result = self.evaluator(self.engines, keep)
        self.tracker.log_pictures(step, pictures)
        return result
