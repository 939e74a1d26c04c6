"""The devices that tests run on, and their order: longest first, so that two test processes end together.

Those of tests/gpu come before: the time on a GPU may be short.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from ds_seg.collector import pause_collector, resume_collector

pytest_plugins = ["measured_rows", "fidelity"]
LONGEST_FIRST = (
    "test_soak test_surroundings test_stopped test_killed_in_a_step test_killed_in_a_save test_full_disk "
    "test_not_finite test_sharded_training test_elastic_resume test_camvid test_demo test_bad_input test_resume "
    "test_elastic_samples test_recipes test_engine_distributed test_heads_and_losses test_ema_distributed "
    "test_benchmark test_compiled_blocks"
).split()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """What is computed on: the CPU, and in a second run of the test a CUDA GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: torch sees none")
    return request.param


@pytest.fixture
def heeded_hangups() -> Iterator[None]:
    """SIGHUP ends a process and its children unless they say otherwise, under nohup too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the collector from what the tests import."""
    pause_collector()
    try:
        return (yield)
    finally:
        resume_collector()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order whole files by how long they take."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem
        if item.path.parent.name == "gpu":
            return -1
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)
