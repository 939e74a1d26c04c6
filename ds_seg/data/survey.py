"""Everything that is in a dataset's files: read once, by all cores, and counted for each split."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from ds_seg.data.label_rules import IGNORED, LabelRule
from ds_seg.data.lint import count_ids, describe_pairs, show_progress
from ds_seg.data.pair_files import PairFiles, PairReport, inspect_pair, start_worker
from ds_seg.errors import DataError

_AT_A_TIME = 16


@dataclass(frozen=True)
class SplitSurvey:
    """What the files of one split hold."""

    field: str
    """Dotted config field, such as data.train."""
    class_names: tuple[str, ...]
    pairs: tuple[PairFiles, ...]
    reports: tuple[PairReport, ...]
    """One a pair."""

    @property
    def annotated(self) -> int:
        """How many annotations could be read."""
        return sum(report.pixels_by_id is not None for report in self.reports)

    @cached_property
    def pixels_by_rule(self) -> Mapping[LabelRule, Counter[int]]:
        """How often each id occurs in the annotations that follow a rule."""
        return count_ids(self.pairs, self.reports)

    @cached_property
    def class_pixels(self) -> list[int]:
        """Pixels of each class."""
        return self._count_classes(pixels=True)

    @cached_property
    def class_images(self) -> list[int]:
        """Images in which each class occurs."""
        return self._count_classes(pixels=False)

    @property
    def ignored_share(self) -> float:
        """Share of all annotated pixels that are ignored, 0 to 1."""
        pixels = sum(sum(counts.values()) for counts in self.pixels_by_rule.values())
        ignored = sum(_ignored_pixels(rule, counts) for rule, counts in self.pixels_by_rule.items())
        return ignored / pixels if pixels else 0.0

    @property
    def ignored_wholly(self) -> list[str]:
        """Annotations whose every pixel is ignored."""
        return [
            pair.annotation_path or ""
            for pair, report in zip(self.pairs, self.reports, strict=True)
            if report.pixels_by_id and all(pair.rule.class_of(label) == IGNORED for label in report.pixels_by_id)
        ]

    def size_range(self) -> str:
        """Smallest and largest image, for people."""
        sizes = sorted(
            {report.size_HW for report in self.reports if report.size_HW}, key=lambda size: size[0] * size[1]
        )
        if not sizes:
            return "-"
        ends = [f"{width} x {height}" for height, width in (sizes[0], sizes[-1])]
        return ends[0] if len(sizes) == 1 else " .. ".join(ends)

    def _count_classes(self, *, pixels: bool) -> list[int]:
        counts = np.zeros(len(self.class_names), np.int64)
        for pair, report in zip(self.pairs, self.reports, strict=True):
            found: Counter[int] = Counter()
            for label, count in (report.pixels_by_id or {}).items():
                found[pair.rule.class_of(label)] += count
            for class_id, count in found.items():
                if class_id >= 0:
                    counts[class_id] += count if pixels else 1
        return counts.tolist()


@dataclass(frozen=True)
class Survey:
    """All splits, and how long it took to read them."""

    splits: tuple[SplitSurvey, ...]
    pairs_read: int
    """Files that two splits share are read once."""
    seconds: float
    workers: int


def survey_datasets(datasets: Mapping[str, Any], *, workers: int, progress: bool) -> Survey:
    """Read every image and annotation of some datasets in full.

    Args:
        datasets: dotted config field -> MMSeg dataset, or MMSeg's wrapper around several.
        workers: processes.
        progress: whether to show a bar.

    Raises:
        DataError: a worker process was ended from outside.
    """
    started = time.perf_counter()
    pairs = {
        field: tuple(dict.fromkeys(describe_pairs(dataset, len(dataset.CLASSES))))
        for field, dataset in datasets.items()
    }
    distinct = list(dict.fromkeys(pair for split in pairs.values() for pair in split))
    reports = dict(zip(distinct, _inspect_all(distinct, workers, progress), strict=True))
    splits = tuple(
        SplitSurvey(field, tuple(datasets[field].CLASSES), split, tuple(reports[pair] for pair in split))
        for field, split in pairs.items()
    )
    return Survey(splits, len(distinct), time.perf_counter() - started, workers)


def _inspect_all(pairs: Sequence[PairFiles], workers: int, progress: bool) -> list[PairReport]:
    """Inspect pairs in processes of their own, spawned, so that no thread of this one is copied into them."""
    workers = max(1, min(workers, len(pairs) // _AT_A_TIME))
    context = multiprocessing.get_context("spawn")
    reports: list[PairReport] = []
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        results = pool.map(partial(inspect_pair, decode_image=True), pairs, chunksize=_AT_A_TIME)
        try:
            reports.extend(show_progress(results, total=len(pairs), label="reading", shown=progress))
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process was ended from outside while it read one of the files from "
                f"{pairs[len(reports)].image_path} on. Most often memory ran out: try fewer --workers (now {workers})."
            ) from error
    return reports


def _ignored_pixels(rule: LabelRule, pixels_by_id: Mapping[int, int]) -> int:
    return sum(count for label, count in pixels_by_id.items() if rule.class_of(label) == IGNORED)
