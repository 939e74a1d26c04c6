"""The MMSeg config sections that ds_seg itself reads, each as one checked value object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_seg.config.faults import Faults

LAYER_DECAY_CONSTRUCTOR = "CustomLayerDecayOptimizerConstructor"
DEFAULT_CONSTRUCTOR = "DefaultOptimizerConstructor"
PRECISION_HOOKS = ("ToBFloat16Hook", "ToFloat16Hook")
"""InternVL's, which change its backbone's precision."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW of both engines, and what each parameter's rate and decay are multiplied by."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    layer_decay_rate: float | None
    """None without layer-wise decay of the rate, and then no parameter is exempt from weight decay."""
    decay_embeddings: bool
    """With layer-wise decay: True decays `pos_embed` and `cls_token` as the published runs did; False exempts them."""
    multipliers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Part of a parameter name -> (factor of the rate, factor of the weight decay); the longest counts."""


@dataclass(frozen=True)
class ScheduleSettings:
    """Poly decay by iteration (with power 0 none), multiplied by a linear warm-up."""

    max_steps: int
    power: float
    min_lr: float
    warmup_steps: int
    warmup_ratio: float


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


def read_optimizer(given: Any, depth: int, faults: Faults) -> OptimizerSettings:
    """The `optimizer` section; `depth` is the number of the backbone's blocks."""
    known = ("type", "lr", "betas", "eps", "weight_decay", "constructor", "paramwise_cfg")
    section = faults.section("optimizer", given, known)
    if section.get("type", "AdamW") != "AdamW":
        faults.add("optimizer.type", f"got {section['type']!r}; both engines run 'AdamW'.")
    constructor = section.get("constructor") or DEFAULT_CONSTRUCTOR
    if constructor not in (LAYER_DECAY_CONSTRUCTOR, DEFAULT_CONSTRUCTOR):
        faults.add(
            "optimizer.constructor", f"got {constructor!r}, want {LAYER_DECAY_CONSTRUCTOR} or {DEFAULT_CONSTRUCTOR}."
        )
    betas = section.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_is_fraction(beta) for beta in betas)):
        faults.add("optimizer.betas", f"got {betas!r}, want two numbers from 0 up to below 1.")
        betas = (0.9, 0.999)
    paramwise_keys = ["custom_keys"]
    if constructor == LAYER_DECAY_CONSTRUCTOR:
        paramwise_keys += ["num_layers", "layer_decay_rate", "decay_embeddings"]
    paramwise = faults.section("optimizer.paramwise_cfg", section.get("paramwise_cfg"), paramwise_keys)
    return OptimizerSettings(
        lr=faults.number("optimizer.lr", section, 1e-4, minimum=0.0),
        betas=(float(betas[0]), float(betas[1])),
        eps=faults.number("optimizer.eps", section, 1e-8, minimum=0.0),
        weight_decay=faults.number("optimizer.weight_decay", section, 0.01, minimum=0.0),
        layer_decay_rate=_read_layer_decay(constructor, paramwise, depth, faults),
        decay_embeddings=faults.flag("optimizer.paramwise_cfg.decay_embeddings", paramwise, False),
        multipliers=_read_multipliers(paramwise.get("custom_keys"), faults),
    )


def _read_layer_decay(constructor: str, paramwise: Mapping[str, Any], depth: int, faults: Faults) -> float | None:
    if constructor != LAYER_DECAY_CONSTRUCTOR:
        return None
    num_layers = paramwise.get("num_layers", depth)
    if num_layers != depth:
        faults.add("optimizer.paramwise_cfg.num_layers", f"got {num_layers}, but model.backbone has {depth} blocks.")
    rate = faults.number("optimizer.paramwise_cfg.layer_decay_rate", paramwise, 1.0, minimum=0.0, maximum=1.0)
    return float(rate)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


def _read_multipliers(given: Any, faults: Faults) -> dict[str, tuple[float, float]]:
    multipliers = {}
    for key, value in faults.section("optimizer.paramwise_cfg.custom_keys", given, None).items():
        where = f"optimizer.paramwise_cfg.custom_keys.{key}"
        factors = faults.section(where, value, ("lr_mult", "decay_mult"))
        multipliers[key] = (
            float(faults.number(f"{where}.lr_mult", factors, 1.0, minimum=0.0)),
            float(faults.number(f"{where}.decay_mult", factors, 1.0, minimum=0.0)),
        )
    return multipliers


def read_optimizer_config(given: Any, faults: Faults) -> tuple[float | None, int | None]:
    """`optimizer_config` -> (largest joint gradient norm or None, accumulation steps or None)."""
    section = faults.section("optimizer_config", given, ("type", "grad_clip", "cumulative_iters"))
    hook = section.get("type", "OptimizerHook")
    if hook not in ("OptimizerHook", "GradientCumulativeOptimizerHook"):
        faults.add("optimizer_config.type", f"got {hook!r}, want 'OptimizerHook' or 'GradientCumulativeOptimizerHook'.")
    clip = faults.section("optimizer_config.grad_clip", section.get("grad_clip"), ("max_norm", "norm_type"))
    clip_norm = None
    if clip:
        if clip.get("norm_type", 2) != 2:
            faults.add(
                "optimizer_config.grad_clip.norm_type", f"got {clip['norm_type']!r}; the joint norm is the 2-norm."
            )
        clip_norm = float(
            faults.number("optimizer_config.grad_clip.max_norm", clip, 1.0, minimum=1e-12, maximum=math.inf)
        )
    if "cumulative_iters" not in section:
        return clip_norm, None
    return clip_norm, faults.integer("optimizer_config.cumulative_iters", section, 1, minimum=1)


def read_schedule(given_lr_config: Any, given_runner: Any, lr: float, faults: Faults) -> ScheduleSettings:
    """`lr_config` and `runner`; `lr` is the optimizer's. Without `lr_config` the rate is constant, as in MMCV."""
    runner = faults.section("runner", given_runner, ("type", "max_iters"))
    if runner.get("type", "IterBasedRunner") != "IterBasedRunner":
        faults.add("runner.type", f"got {runner['type']!r}, want 'IterBasedRunner' with max_iters.")
    known = ("policy", "power", "min_lr", "by_epoch", "warmup", "warmup_iters", "warmup_ratio", "warmup_by_epoch")
    lr_config = faults.section("lr_config", given_lr_config, known)
    if str(lr_config.get("policy", "poly")).lower() != "poly":
        faults.add(
            "lr_config.policy", f"got {lr_config['policy']!r}, want 'poly', or lr_config=None for a constant rate."
        )
    for flag in ("by_epoch", "warmup_by_epoch"):
        if faults.flag(f"lr_config.{flag}", lr_config, False):
            faults.add(f"lr_config.{flag}", "got True; schedules move by iteration, so it must be False.")
    warmup = lr_config.get("warmup")
    if warmup not in (None, "linear"):
        faults.add("lr_config.warmup", f"got {warmup!r}, want 'linear' or None.")
    min_lr = float(faults.number("lr_config.min_lr", lr_config, 0.0, minimum=0.0))
    if min_lr > lr:
        faults.add("lr_config.min_lr", f"got {min_lr:g}, above optimizer.lr={lr:g}: the rate would rise. Lower it.")
    warmup_steps = faults.integer("lr_config.warmup_iters", lr_config, 0, minimum=0)
    return ScheduleSettings(
        max_steps=faults.integer("runner.max_iters", runner, 80000, minimum=1),
        power=float(faults.number("lr_config.power", lr_config, 0.0 if given_lr_config is None else 1.0, minimum=0.0)),
        min_lr=min_lr,
        warmup_steps=warmup_steps if warmup == "linear" else 0,
        warmup_ratio=float(faults.number("lr_config.warmup_ratio", lr_config, 0.1, minimum=0.0, maximum=1.0)),
    )


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
        fields = faults.section(where, hook, ("type", "init_kwargs", "interval", "by_epoch"))
        name = fields.get("type")
        if name == "WandbLoggerHook":
            init_kwargs = faults.section(f"{where}.init_kwargs", fields.get("init_kwargs"), None)
            wandb = WandbSettings(enabled=True, init_kwargs=dict(init_kwargs))
        elif name == "TensorboardLoggerHook":
            ignored[where] = f"{name} is not here; metrics.jsonl has the numbers, and report.html their curves"
        elif name != "TextLoggerHook":
            faults.add(where, f"got type {name!r}, want 'TextLoggerHook' or 'WandbLoggerHook'.")
        if where not in ignored and fields.get("interval", interval_steps) != interval_steps:
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
