import pytest
import torch

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config import ScheduleSettings
from ds_seg.engine.schedule import compute_lr

from mmcv.runner.hooks.lr_updater import PolyLrUpdaterHook  # isort: skip


class FakeRunner:
    """What mmcv's hook reads of a runner."""

    def __init__(self, max_iters, lrs):
        self.max_iters = self._max_iters = max_iters
        self.iter = 0
        self.optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs], lr=0.1)


def mmcv_rates(settings, lrs):
    hook = PolyLrUpdaterHook(
        power=settings.power,
        min_lr=settings.min_lr,
        by_epoch=False,
        warmup="linear" if settings.warmup_steps else None,
        warmup_iters=settings.warmup_steps or 1,
        warmup_ratio=settings.warmup_ratio,
    )
    runner = FakeRunner(settings.max_steps, lrs)
    hook.before_run(runner)
    for step in range(settings.max_steps):
        runner.iter = step
        hook.before_train_iter(runner)
        yield [group["lr"] for group in runner.optimizer.param_groups]


@pytest.mark.parametrize(
    "settings",
    [
        ScheduleSettings(40, 1.0, 0.0, 7, 1e-6),
        ScheduleSettings(40, 0.9, 1e-5, 0, 0.1),
        ScheduleSettings(25, 2.0, 1e-6, 25, 0.5),
    ],
)
def test_equals_mmcv_at_every_step_of_every_group(settings):
    lrs = [4e-5, 4e-5 * 0.95**20]
    for step, wanted in enumerate(mmcv_rates(settings, lrs)):
        assert [compute_lr(lr, step, settings) for lr in lrs] == pytest.approx(wanted, rel=1e-12)


def test_is_the_floor_after_the_last_step():
    assert compute_lr(1.0, 10, ScheduleSettings(10, 1.0, 0.25, 0, 0.1)) == 0.25
    assert compute_lr(1.0, 11, ScheduleSettings(10, 1.0, 0.25, 0, 0.1)) == 0.25
