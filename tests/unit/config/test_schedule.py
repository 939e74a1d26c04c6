import math

import pytest

from ds_seg.config.faults import Faults
from ds_seg.config.schedule import POLICIES, read_schedule

MAX_STEPS = 40
LR = 4e-5


def schedule_of(**lr_config):
    faults = Faults("a.py")
    schedule = read_schedule(lr_config, {"max_iters": MAX_STEPS}, LR, faults)
    assert not faults.messages
    return schedule


def faults_of(**lr_config):
    faults = Faults("a.py")
    read_schedule(lr_config, {"max_iters": MAX_STEPS}, LR, faults)
    return faults.messages


def rates_of(schedule, base_lr=LR):
    group = {"base_lr": base_lr}
    for step in range(MAX_STEPS):
        schedule.set_rates([group], step)
        yield group["lr"]


def poly(power=1.0, min_lr=0.0):
    return lambda lr, step: (lr - min_lr) * (1 - step / MAX_STEPS) ** power + min_lr


def cosine(lr, step):
    return lr * (0.01 + 0.99 * (1 + math.cos(math.pi * step / MAX_STEPS)) / 2)


WANTED = {
    "poly by default": ({}, poly()),
    "poly": ({"policy": "poly", "power": 0.9, "min_lr": 1e-6}, poly(0.9, 1e-6)),
    "Poly as MMCV also takes it": ({"policy": "Poly", "power": 2, "by_epoch": False}, poly(2)),
    "CosineAnnealing": ({"policy": "CosineAnnealing", "min_lr_ratio": 0.01}, cosine),
    "step": ({"policy": "step", "step": [10, 30]}, lambda lr, step: lr * 0.1 ** sum(step >= at for at in (10, 30))),
    "step that repeats": ({"policy": "step", "step": 15, "gamma": 0.5}, lambda lr, step: lr * 0.5 ** (step // 15)),
    "exp": ({"policy": "exp", "gamma": 0.9}, lambda lr, step: lr * 0.9**step),
    "fixed": ({"policy": "fixed"}, lambda lr, step: lr),
    "inv": ({"policy": "inv", "gamma": 0.1}, lambda lr, step: lr / (1 + 0.1 * step)),
    "LinearAnnealing": ({"policy": "LinearAnnealing", "min_lr": 0.0}, poly()),
}


@pytest.mark.parametrize("case", WANTED)
def test_the_policies_of_mmcv(case):
    lr_config, wanted = WANTED[case]
    for base_lr in (LR, LR * 0.95**20):
        expected = [wanted(base_lr, step) for step in range(MAX_STEPS)]
        assert list(rates_of(schedule_of(**lr_config), base_lr)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "lr_config",
    [
        {"policy": "FlatCosineAnnealing", "min_lr": 0.0, "start_percent": 0.5},
        {"policy": "CosineRestart", "min_lr": 0.0, "periods": [20, 20], "restart_weights": [1, 0.5]},
        {"policy": "cyclic", "target_ratio": (2, 1e-3)},
    ],
)
def test_the_rest_of_the_policies_change_the_rate(lr_config):
    rates = list(rates_of(schedule_of(**lr_config)))
    assert len(set(rates)) > 10 and all(0 < rate <= 2 * LR for rate in rates)


def test_every_policy_is_tried_here():
    tried = {config.get("policy", "poly") for config, _ in WANTED.values()} - {"Poly"}
    assert tried | {"FlatCosineAnnealing", "CosineRestart", "cyclic"} == set(POLICIES)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("linear", lambda step: 1 - (1 - step / 7) * 0.75),
        ("constant", lambda step: 0.25),
        ("exp", lambda step: 0.25 ** (1 - step / 7)),
    ],
)
def test_a_warm_up_multiplies_a_rate_that_decays_already(kind, factor):
    schedule = schedule_of(warmup=kind, warmup_iters=7, warmup_ratio=0.25)
    wanted = [poly()(LR, step) * (factor(step) if step < 7 else 1) for step in range(MAX_STEPS)]
    assert list(rates_of(schedule)) == pytest.approx(wanted, rel=1e-12)
    assert schedule.warmup_steps == 7


def test_warm_up_needs_its_kind_as_in_mmcv():
    kinds = ({}, {"warmup": None}, {"warmup": "linear"})
    assert [schedule_of(**kind, warmup_iters=7).warmup_steps for kind in kinds] == [0, 0, 7]
    assert schedule_of(warmup="linear", warmup_iters=0).warmup_steps == 0


def test_without_lr_config_the_rate_is_constant():
    schedule = read_schedule(None, {}, LR, Faults("a.py"))
    assert schedule.max_steps == 80000 and set(rates_of(schedule)) == {LR}


def test_is_the_floor_after_the_last_step():
    group, schedule = {"base_lr": LR}, schedule_of(min_lr=1e-6)
    for step in (MAX_STEPS, MAX_STEPS + 1):
        schedule.set_rates([group], step)
        assert group["lr"] == 1e-6


@pytest.mark.parametrize(
    ("lr_config", "message"),
    [
        ({"policy": "OneCycle", "max_lr": 1e-3}, "lr_config.policy: got 'OneCycle', want one of poly, CosineAnnealing"),
        ({"policy": "CosineAnnealing", "power": 1}, "lr_config.power: unknown key. Known here: by_epoch, min_lr"),
        ({"policy": "CosineAnnealing"}, "lr_config: MMCV's hook for this policy does not take it"),
        ({"policy": "step"}, "missing 1 required positional argument: 'step'"),
        ({"policy": "step", "step": "9"}, '"step" must be a list or integer'),
        (
            {"policy": "CosineRestart", "periods": [9], "min_lr": 0.0},
            "Current iteration 19 exceeds cumulative_periods [9]",
        ),
        ({"policy": "exp", "gamma": -1}, "lr_config.gamma: got -1, want at least 0"),
        ({"policy": "cyclic", "target_ratio": (-1.0, 1.0)}, "lr_config: gives -"),
        ({"warmup": "slow"}, "lr_config.warmup: got 'slow', want one of linear, constant, exp, or None."),
        ({"warmup": "linear", "warmup_iters": 5, "warmup_ratio": 0}, "lr_config.warmup_ratio: got 0, want between"),
        ({"by_epoch": True}, "lr_config.by_epoch: got True; schedules move by iteration"),
        ({"min_lr": 1}, "lr_config.min_lr: got 1, above optimizer.lr=4e-05: the rate would rise."),
    ],
)
def test_what_mmcv_does_not_take_is_one_fault(lr_config, message):
    (fault,) = faults_of(**lr_config)
    assert message in fault
