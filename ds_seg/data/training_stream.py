"""The training set as an endless stream: what stands at a position follows from (seed, position) alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from ds_seg.data.bad_samples import BadSample, UnreadableSample, too_many_bad_samples
from ds_seg.data.noise import seeded_noise
from ds_seg.data.samples import load_or_error


class StreamSample(NamedTuple):
    """What stands at a position of the stream."""

    position: int
    sample: Any
    """Or the error that kept it from loading."""
    replaced: list[BadSample]


class SeededStream(Dataset):
    """The samples of the stream by their positions.

    Args:
        dataset: MMSeg training dataset.
        seed: of the order and of every augmentation.
        max_bad_samples: above 0, a sample whose files can't be read is replaced.
    """

    def __init__(self, dataset: Any, seed: int, max_bad_samples: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.max_bad_samples = max_bad_samples
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))

    def index_at(self, position: int) -> int:
        """Index into the dataset of the sample at `position`."""
        epoch, offset = divmod(position, len(self.dataset))
        return int(self._permutation(epoch)[offset])

    def __getitem__(self, position: int) -> StreamSample:
        replaced: list[BadSample] = []
        for index in self._candidates(position):
            with seeded_noise(self.seed, position):
                sample = load_or_error(self.dataset, index)
            if not (self.max_bad_samples and isinstance(sample, UnreadableSample)):
                return StreamSample(position, sample, replaced)
            replaced.append(BadSample(position, sample.file, str(sample)))
            if len(replaced) > self.max_bad_samples:
                break
        return StreamSample(position, too_many_bad_samples(replaced, self.max_bad_samples), replaced)

    def _candidates(self, position: int) -> Iterator[int]:
        """The sample that belongs at `position`, and then those that may stand in, from the seed and the position."""
        own = self.index_at(position)
        yield own
        others = np.random.default_rng((self.seed, position, 1)).permutation(len(self.dataset))
        yield from (int(index) for index in others if index != own)
