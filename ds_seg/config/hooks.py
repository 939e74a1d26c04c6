"""`log_config` and `custom_hooks`: what is logged, wandb, and averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_seg.config.faults import Faults

_WANDB_LOGGERS = ("WandbLoggerHook", "MMSegWandbHook")
_LOGGER_KEYS = ("type", "init_kwargs", "interval", "by_epoch")
_IDLE_LOGGER_KEYS = {
    **dict.fromkeys(("ignore_last", "reset_flag", "interval_exp_name"), "each row is of one step"),
    **dict.fromkeys(("commit", "with_step"), "each row is sent with its step"),
    **dict.fromkeys(("log_checkpoint", "log_checkpoint_metadata"), "checkpoints are not uploaded"),
    "num_eval_images": "predictions/ has the pictures",
}
PRECISION_HOOKS = ("ToBFloat16Hook", "ToFloat16Hook")
"""InternVL's, which change its backbone's precision."""


@dataclass(frozen=True)
class EmaSettings:
    """Averages of the weights, as MMCV's EMAHook describes them."""

    momentum: float
    """The share that new weights get; taken to the power of the interval, as EMAHook does."""
    interval_steps: int
    warm_up_steps: int
    """Bounds the share of step k by (1 + k) / (warm_up + k); 1 bounds nothing."""


@dataclass(frozen=True)
class WandbSettings:
    """Whether and under which names the run is logged to wandb."""

    enabled: bool
    init_kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_log_config(given: Any, faults: Faults) -> tuple[int, WandbSettings, dict[str, str]]:
    """`log_config` -> (steps between logged rows, wandb settings, keys that have no meaning here with the reason)."""
    section = faults.section("log_config", given, ("interval", "hooks"))
    interval_steps = faults.integer("log_config.interval", section, 50, minimum=1)
    wandb, ignored = WandbSettings(enabled=False), {}
    hooks = section.get("hooks") or []
    if not isinstance(hooks, (list, tuple)):
        faults.add("log_config.hooks", f"got {hooks!r}, want a list of dicts.")
        hooks = []
    for index, hook in enumerate(hooks):
        where = f"log_config.hooks[{index}]"
        name = hook.get("type") if isinstance(hook, Mapping) else None
        if name == "TensorboardLoggerHook":
            ignored[where] = f"{name} is not here; metrics.jsonl has the numbers, and report.html their curves"
            continue
        if name not in ("TextLoggerHook", *_WANDB_LOGGERS):
            faults.add(where, f"got type {name!r}, want a dict of type 'TextLoggerHook' or 'WandbLoggerHook'.")
            continue
        fields = faults.section(where, hook, (*_LOGGER_KEYS, *_IDLE_LOGGER_KEYS))
        if name in _WANDB_LOGGERS:
            init_kwargs = faults.section(f"{where}.init_kwargs", fields.get("init_kwargs"), None)
            wandb = WandbSettings(enabled=True, init_kwargs=dict(init_kwargs))
        ignored.update({f"{where}.{key}": why for key, why in _IDLE_LOGGER_KEYS.items() if key in fields})
        if fields.get("interval", interval_steps) != interval_steps:
            ignored[f"{where}.interval"] = f"everything is logged every {interval_steps} steps, by log_config.interval"
    return interval_steps, wandb, ignored


def read_custom_hooks(given: Any, faults: Faults) -> tuple[EmaSettings | None, dict[str, str]]:
    """`custom_hooks` -> (averages of the weights or None, keys that have no meaning here with the reason)."""
    if not isinstance(given or [], (list, tuple)):
        faults.add("custom_hooks", f"got {given!r}, want a list of dicts.")
        return None, {}
    ema, ignored = None, {}
    for index, hook in enumerate(given or []):
        where = f"custom_hooks[{index}]"
        name = hook.get("type") if isinstance(hook, Mapping) else None
        if name in PRECISION_HOOKS:
            ignored[where] = f"{name} changes a precision that is fixed, the DeepSpeed JSON's and FP32 for the head"
        elif name != "EMAHook":
            faults.add(
                where,
                f"got {name or hook!r}, want a dict of type 'EMAHook', or '{PRECISION_HOOKS[0]}', which changes "
                "nothing here. Hooks of other types are not run: remove it.",
            )
        elif ema is not None:
            faults.add(where, "is a second EMAHook. Keep one.")
        else:
            ema = _read_ema(where, hook, faults)
            if "priority" in hook:
                ignored[f"{where}.priority"] = "averages move right after the step"
    return ema, ignored


def _read_ema(where: str, hook: Mapping[str, Any], faults: Faults) -> EmaSettings:
    section = faults.section(where, hook, ("type", "momentum", "interval", "warm_up", "resume_from", "priority"))
    if section.get("resume_from") is not None:
        faults.add(
            f"{where}.resume_from", f"got {section['resume_from']!r}; averages come back with --resume. Remove it."
        )
    momentum = float(faults.number(f"{where}.momentum", section, 0.0002, minimum=0.0, maximum=1.0))
    if momentum in (0.0, 1.0):
        faults.add(f"{where}.momentum", f"got {section['momentum']!r}, want a number above 0 and below 1.")
    return EmaSettings(
        momentum=momentum,
        interval_steps=faults.integer(f"{where}.interval", section, 1, minimum=1),
        warm_up_steps=faults.integer(f"{where}.warm_up", section, 100, minimum=1),
    )
