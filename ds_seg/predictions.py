"""Pictures of predictions: drawn while a run evaluates, kept in its work dir, sent to wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.engine.engines import Engines
from ds_seg.evaluation.evaluate import EvaluationResult
from ds_seg.evaluation.lockstep import Prediction
from ds_seg.evaluation.pictures import draw_comparison, load_rgb, save_picture
from ds_seg.session import Evaluator
from ds_seg.tracking.tracker import Tracker

PICTURES = 8


class PredictingEvaluator:
    """Evaluates and, on the way, draws the same few images each time."""

    def __init__(self, run: RunConfig, evaluator: Evaluator, engines: Engines, tracker: Tracker) -> None:
        self.folder = run.work_dir / "predictions"
        self.evaluator, self.engines, self.tracker = evaluator, engines, tracker
        size = len(evaluator.dataset)
        self.indices = frozenset(np.linspace(0, size - 1, min(PICTURES, size), dtype=int).tolist())

    def __call__(self, step: int) -> EvaluationResult:
        """Evaluate after `step` steps; a collective over all ranks."""
        pictures: list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]] = []

        def draw(prediction: Prediction, label_HW: np.ndarray) -> None:
            if prediction.index in self.indices:
                pictures.append(self._draw(prediction, label_HW))

        result = self.evaluator(self.engines, draw)
        distributed.barrier()
        self.tracker.log_pictures(step, pictures)
        return result

    def _draw(
        self, prediction: Prediction, label_HW: np.ndarray
    ) -> tuple[str, np.ndarray, np.ndarray, np.ndarray | None]:
        dataset: Any = self.evaluator.dataset
        image = load_rgb(prediction.meta["filename"])
        name = Path(prediction.meta["ori_filename"]).stem
        picture = draw_comparison(image, prediction.labels_HW, label_HW, dataset.PALETTE, dataset.CLASSES)
        save_picture(picture, self.folder / f"{prediction.index:04d}_{name}.png")
        return name, image, prediction.labels_HW, label_HW
