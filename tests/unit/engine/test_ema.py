"""Averages of the heads against MMCV's own EMAHook; those of a sharded backbone are in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config import EmaSettings
from ds_seg.engine.ema import WeightAverages, compute_momentum

from mmcv.runner.hooks import EMAHook  # isort: skip

SETTINGS = EmaSettings(momentum=0.3, interval_steps=1, warm_up_steps=10)


def make_averages(heads, settings):
    """Averages beside a frozen backbone, which has none."""
    backbone = SimpleNamespace(module=nn.Linear(2, 2))
    engines = SimpleNamespace(trainable_backbone=[], backbone=backbone, heads=heads, device=torch.device("cpu"))
    return WeightAverages(engines, settings)


@torch.no_grad()
def move(heads, step):
    """Stands for an optimizer step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in heads.parameters():
        parameter += torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "settings", [SETTINGS, EmaSettings(0.3, 1, 1), EmaSettings(0.8, 3, 10), EmaSettings(0.0002, 1, 100)], ids=str
)
def test_averages_are_those_of_mmcvs_hook(settings):
    heads = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = make_averages(heads, settings)
    hook = EMAHook(settings.momentum, settings.interval_steps, settings.warm_up_steps)
    runner = SimpleNamespace(model=heads, iter=0)
    hook.before_run(runner)
    for step in range(12):
        move(heads, step)
        runner.iter = step
        hook.after_train_iter(runner)
        ema.update(step)
    wanted = {name: hook.model_buffers[buffer] for name, buffer in hook.param_ema_buffer.items()}
    assert ema.heads.keys() == wanted.keys() and ema.backbone == {}
    for name, average in ema.heads.items():
        assert not torch.equal(average, heads.get_parameter(name))
        torch.testing.assert_close(average, wanted[name], rtol=0, atol=4e-6)  # measured: 9.6e-7, one ulp of 8


@pytest.mark.parametrize(
    ("step", "settings", "share"),
    [
        (0, SETTINGS, 1 / 10),
        (1, SETTINGS, 2 / 11),
        (2, SETTINGS, 3 / 12),
        (3, SETTINGS, 0.3),
        (10**6, SETTINGS, 0.3),
        (0, EmaSettings(0.0002, 1, 100), 0.0002),
        (0, EmaSettings(0.3, 1, 1), 0.3),
        (9, EmaSettings(0.5, 3, 1), 0.125),
    ],
)
def test_the_share_of_new_weights(step, settings, share):
    assert compute_momentum(step, settings) == pytest.approx(share, rel=1e-15)


def test_a_frozen_parameter_has_no_average_and_equal_weights_stay_what_they_are():
    heads = nn.Linear(3, 2)
    heads.bias.requires_grad_(False)
    ema = make_averages(heads, SETTINGS)
    for step in range(5):
        ema.update(step)
    assert list(ema.heads) == ["weight"] and torch.equal(ema.heads["weight"], heads.weight)


def test_the_weights_come_back_after_the_averages_were_used():
    heads = nn.Linear(3, 2)
    ema = make_averages(heads, SETTINGS)
    move(heads, 0)
    ema.update(0)
    live, averages = heads.weight.detach().clone(), ema.heads["weight"].clone()
    with ema.applied():
        assert torch.equal(heads.weight, averages)
    assert torch.equal(heads.weight, live) and torch.equal(ema.heads["weight"], averages)


def test_saved_averages_are_taken_over_as_copies():
    ema = make_averages(nn.Linear(3, 2), SETTINGS)
    saved = {name: torch.full_like(average, 0.1) for name, average in ema.heads.items()}
    ema.load({}, saved)
    ema.update(0)
    assert not torch.equal(ema.heads["weight"], saved["weight"]) and torch.all(saved["weight"] == 0.1)
