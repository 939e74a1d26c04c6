"""`lr_config` and `runner`: how long a run is, and the arguments of MMCV's hook that gives its learning rates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.faults import Faults, suggest

from mmcv.runner.hooks import HOOKS, lr_updater  # isort: skip

POLICIES = (
    "poly",
    "CosineAnnealing",
    "CosineRestart",
    "FlatCosineAnnealing",
    "LinearAnnealing",
    "cyclic",
    "exp",
    "fixed",
    "inv",
    "step",
)
"""MMCV's, but for OneCycle, which puts one rate in the place of all groups' own."""
_WARM_UPS = ("linear", "constant", "exp")
_BOUNDS = {
    "gamma": (0.0, math.inf),
    "min_lr_ratio": (0.0, 1.0),
    "power": (0.0, math.inf),
    "start_percent": (0.0, 1.0),
    "warmup_ratio": (1e-12, 1.0),
}


@dataclass(frozen=True)
class ScheduleSettings:
    """The length of a run and its learning rates, by optimizer step."""

    max_steps: int
    lr_hook: Mapping[str, Any]
    """`type` and arguments of one of MMCV's LrUpdaterHooks."""

    @property
    def warmup_steps(self) -> int:
        """How many steps the rate warms up for."""
        return self.lr_hook["warmup_iters"] if self.lr_hook.get("warmup") else 0

    def set_rates(self, groups: Sequence[dict[str, Any]], step: int) -> None:
        """Give each parameter group its `lr` for one optimizer step.

        Args:
            groups: have `base_lr`, the rate before any schedule.
            step: optimizer steps done so far, from 0; from `max_steps` on the rates are those of the end.

        Source: mmcv 1.7 `mmcv/runner/hooks/lr_updater.py`, whose hooks are asked. The policy runs from step 0, so a
        warm-up multiplies a rate that is decaying already.
        """
        rated = [{"lr": group["base_lr"]} for group in groups]
        optimizer = SimpleNamespace(param_groups=rated)
        runner = SimpleNamespace(iter=min(step, self.max_steps), max_iters=self.max_steps, optimizer=optimizer)
        hook = HOOKS.build(dict(self.lr_hook))
        hook.before_run(runner)
        hook.before_train_iter(runner)
        for group, scheduled in zip(groups, rated, strict=True):
            group["lr"] = scheduled["lr"]


def read_schedule(given_lr_config: Any, given_runner: Any, lr: float, faults: Faults) -> ScheduleSettings:
    """`lr_config` and `runner`; `lr` is the optimizer's. Without `lr_config` the rate is constant, as in MMCV."""
    runner = faults.section("runner", given_runner, ("type", "max_iters", "max_epochs"))
    if runner.get("type", "IterBasedRunner") != "IterBasedRunner" or "max_epochs" in runner:
        faults.add(
            "runner",
            f"got {dict(runner)}, want dict(type='IterBasedRunner', max_iters=...): an epoch takes as many iterations "
            "as the training images divided by the crops of a step.",
        )
    max_steps = faults.integer("runner.max_iters", runner, 80000, minimum=1)
    constant = ScheduleSettings(max_steps, {"type": lr_updater.FixedLrUpdaterHook, "by_epoch": False})
    if given_lr_config is None:
        return constant
    noted = len(faults.messages)
    hook = _read_hook(given_lr_config, lr, faults)
    if len(faults.messages) > noted:
        return constant
    schedule = ScheduleSettings(max_steps, hook)
    _try_rates(schedule, lr, faults)
    return schedule


def _read_hook(given: Any, lr: float, faults: Faults) -> dict[str, Any]:
    policy = given.get("policy", "poly") if isinstance(given, Mapping) else "poly"
    names = {name.lower(): name for name in POLICIES}
    name = names.get(str(policy).lower())
    if name is None:
        faults.add(
            "lr_config.policy",
            f"got {policy!r}, want one of {', '.join(POLICIES)}, or lr_config=None for a constant rate."
            f"{suggest(str(policy), POLICIES)}",
        )
        return {}
    hook = getattr(lr_updater, f"{name[0].upper()}{name[1:]}LrUpdaterHook")
    classes = (hook, lr_updater.LrUpdaterHook)
    known = {argument for owner in classes for argument in inspect.signature(owner).parameters} - {"kwargs"}
    section = faults.section("lr_config", given, {"policy", *known}, replaces=True)
    for flag in ("by_epoch", "warmup_by_epoch"):
        if faults.flag(f"lr_config.{flag}", section, False):
            faults.add(f"lr_config.{flag}", "got True; schedules move by iteration, so it must be False.")
    for key in _BOUNDS.keys() & section.keys():
        minimum, maximum = _BOUNDS[key]
        faults.number(f"lr_config.{key}", section, 1.0, minimum=minimum, maximum=maximum)
    if section.get("min_lr") is not None:
        min_lr = faults.number("lr_config.min_lr", section, 0.0, minimum=0.0)
        if min_lr > lr:
            faults.add("lr_config.min_lr", f"got {min_lr:g}, above optimizer.lr={lr:g}: the rate would rise. Lower it.")
    if section.get("warmup") not in (None, *_WARM_UPS):
        faults.add("lr_config.warmup", f"got {section['warmup']!r}, want one of {', '.join(_WARM_UPS)}, or None.")
    if not faults.integer("lr_config.warmup_iters", section, 0, minimum=0):
        section = {**section, "warmup": None}  # MMCV asks for at least one step where there is a warm-up
    arguments = {key: value for key, value in section.items() if key in known}
    return {**arguments, "by_epoch": False, "type": hook}


def _try_rates(schedule: ScheduleSettings, lr: float, faults: Faults) -> None:
    """Ask for some rates, since MMCV says what it doesn't take only when it is asked, and not always then."""
    last = schedule.max_steps - 1
    for step in (0, 1, last // 2, last):
        group = {"base_lr": lr}
        try:
            schedule.set_rates([group], step)
        except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            faults.add("lr_config", f"MMCV's hook for this policy does not take it: {error or type(error).__name__}.")
            return
        if not isinstance(group["lr"], (int, float)) or not 0 <= group["lr"] < math.inf:
            faults.add("lr_config", f"gives {group['lr']!r} as the rate of step {step}, want a number from 0 up.")
            return
