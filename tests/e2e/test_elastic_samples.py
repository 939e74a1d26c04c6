"""A run that is stopped twice and goes on with other numbers of processes and workers sees each sample once, in order.

What a step gets is counted and hashed where the step gets it: file name, augmented pixels and labels.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("samples_worker.py")
TIMEOUT_S = 200
pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)
# 16 images, 4 crops a step: an epoch has four steps, and both stops lie in the first one
STARTS = [("two", 2, 2, 2), ("one", 1, 0, 3), ("four", 4, 1, 0)]
STEPS = 6


@pytest.fixture(scope="module")
def seen(tmp_path_factory, scenes, tiny_config):
    """By start, what every rank saw; `through` is a run of one process that was never stopped."""
    out = tmp_path_factory.mktemp("samples")
    config = out / "small_steps.py"
    config.write_text(
        f"_base_ = {str(tiny_config)!r}\nglobal_batch = None\ndata = dict(samples_per_gpu=2)\n"
        f"runner = dict(max_iters={STEPS})\ncheckpoint_config = dict(interval=100)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_SEG_DEMO_ROOT", str(scenes))
        patch.setenv("WANDB_MODE", "disabled")
        for name, world, workers, stop_after in STARTS:
            run_ranks(WORKER, world, config, out, workers, name, stop_after, timeout_s=TIMEOUT_S)
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("through", "one", "two", "four")}


def steps_of(ranks):
    """By step, the samples of all ranks."""
    return {int(step): [sample for rank in ranks for sample in rank["seen"][step]] for step in ranks[0]["seen"]}


def test_every_step_gets_the_samples_of_the_run_that_was_never_stopped(seen):
    through = steps_of(seen["through"])
    assert list(through) == list(range(STEPS))
    parts = [steps_of(seen[name]) for name, *_ in STARTS]
    assert [list(part) for part in parts] == [[0, 1], [2], [3, 4, 5]]
    for part in parts:
        for step, samples in part.items():
            assert sorted(samples) == sorted(through[step]), step


def test_an_epoch_has_every_image_once(seen):
    parts = [steps_of(seen[name]) for name, *_ in STARTS]
    together = parts[0] | parts[1] | parts[2]
    names = [sample.split()[0] for step in range(4) for sample in together[step]]
    assert len(names) == len(set(names)) == 16
    pixels = [sample.split()[1] for step in range(STEPS) for sample in together[step]]
    assert len(set(pixels)) == 4 * STEPS  # the second epoch cuts and flips in another way


def test_the_global_batch_of_the_first_start_is_kept_and_said(seen):
    assert [rank["micro_batch"] for name, *_ in STARTS for rank in seen[name]] == [2, 2, 2, 1, 1, 1, 1]
    assert [seen[name][0]["stopped"] for name, *_ in STARTS] == [True, True, False]
    assert seen["two"][0]["notes"] == []
    (note,) = seen["one"][0]["notes"]
    assert "global batch of 4 = 2 crops x 2 micro-batches x 1 process; the checkpoint's was 4 = 2 crops x 1" in note
    assert any(
        "4 = 1 crop x 1 micro-batch x 4 processes; the checkpoint's was 4" in note for note in seen["four"][0]["notes"]
    )
