"""What a pipeline draws at random, made to follow from the place of its sample."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded_noise(seed: int, position: int) -> Iterator[None]:
    """Within it all generators that a pipeline may use are seeded from the pair; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence((seed, position)).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])
    # torch.manual_seed would reach for the GPU, which a worker must not touch
    torch.default_generator.manual_seed(int(words[4]) << 32 | int(words[5]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
