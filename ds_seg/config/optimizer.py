"""`optimizer` and `optimizer_config`: AdamW, what multiplies its rates and decays, clipping and accumulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_seg.config.dialect import list_ignored_names
from ds_seg.config.faults import Faults

LAYER_DECAY_CONSTRUCTOR = "CustomLayerDecayOptimizerConstructor"
_LAYER_DECAY_CONSTRUCTORS = {
    LAYER_DECAY_CONSTRUCTOR: "layer_decay_rate",
    "LayerDecayOptimizerConstructor": "layer_decay_rate",
    "LearningRateDecayOptimizerConstructor": "decay_rate",
}
"""InternVL's and MMSegmentation's, with the name of the rate in `paramwise_cfg`; they do the same."""
DEFAULT_CONSTRUCTOR = "DefaultOptimizerConstructor"


@dataclass(frozen=True)
class KindMultipliers:
    """Factors for parameters of a kind, for those that no name in `custom_keys` matches."""

    bias_lr_mult: float = 1.0
    bias_decay_mult: float = 1.0
    """Biases but those of norms."""
    norm_decay_mult: float = 1.0
    dwconv_decay_mult: float = 1.0
    """Depth-wise convolutions, of which heads have some."""


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
    kinds: KindMultipliers = KindMultipliers()


_PARAMWISE = "optimizer.paramwise_cfg"
_KINDS = tuple(field.name for field in dataclasses.fields(KindMultipliers))


def read_optimizer(given: Any, depth: int, faults: Faults) -> OptimizerSettings:
    """The `optimizer` section; `depth` is the number of the backbone's blocks."""
    known = ("type", "lr", "betas", "eps", "weight_decay", "constructor", "paramwise_cfg")
    is_adamw = not isinstance(given, Mapping) or given.get("type", "AdamW") == "AdamW"
    section = faults.section("optimizer", given, known if is_adamw else None, replaces=True)
    if not is_adamw:
        faults.add(
            "optimizer.type",
            f"got {section['type']!r}; both engines run 'AdamW', which takes other rates. Write "
            "optimizer=dict(_delete_=True, type='AdamW', lr=..., weight_decay=...).",
        )
    constructor = section.get("constructor") or DEFAULT_CONSTRUCTOR
    if constructor not in (*_LAYER_DECAY_CONSTRUCTORS, DEFAULT_CONSTRUCTOR):
        faults.add(
            "optimizer.constructor", f"got {constructor!r}, want {LAYER_DECAY_CONSTRUCTOR} or {DEFAULT_CONSTRUCTOR}."
        )
    betas = section.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_is_fraction(beta) for beta in betas)):
        faults.add("optimizer.betas", f"got {betas!r}, want two numbers from 0 up to below 1.")
        betas = (0.9, 0.999)
    paramwise_keys = ["custom_keys"]
    if rate := _LAYER_DECAY_CONSTRUCTORS.get(constructor):
        paramwise_keys += ["num_layers", rate, "decay_type", "decay_embeddings"]
    else:
        paramwise_keys += [*_KINDS, "bypass_duplicate"]
    paramwise = faults.section(_PARAMWISE, section.get("paramwise_cfg"), paramwise_keys)
    return OptimizerSettings(
        lr=faults.number("optimizer.lr", section, 1e-4, minimum=0.0),
        betas=(float(betas[0]), float(betas[1])),
        eps=faults.number("optimizer.eps", section, 1e-8, minimum=0.0),
        weight_decay=faults.number("optimizer.weight_decay", section, 0.01, minimum=0.0),
        layer_decay_rate=_read_layer_decay(constructor, paramwise, depth, faults),
        decay_embeddings=faults.flag(f"{_PARAMWISE}.decay_embeddings", paramwise, False),
        multipliers=_read_multipliers(paramwise.get("custom_keys"), faults),
        kinds=KindMultipliers(
            **{kind: float(faults.number(f"{_PARAMWISE}.{kind}", paramwise, 1.0, minimum=0.0)) for kind in _KINDS}
        ),
    )


def _read_layer_decay(constructor: str, paramwise: Mapping[str, Any], depth: int, faults: Faults) -> float | None:
    name = _LAYER_DECAY_CONSTRUCTORS.get(constructor)
    if name is None:
        return None
    if "layer_wise" not in str(paramwise.get("decay_type", "layer_wise")):
        faults.add(f"{_PARAMWISE}.decay_type", f"got {paramwise['decay_type']!r}, want 'layer_wise'.")
    num_layers = paramwise.get("num_layers", depth)
    if num_layers != depth:
        faults.add(f"{_PARAMWISE}.num_layers", f"got {num_layers}, but model.backbone has {depth} blocks.")
    rate = faults.number(f"{_PARAMWISE}.{name}", paramwise, 1.0, minimum=0.0, maximum=1.0)
    return float(rate)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


def _read_multipliers(given: Any, faults: Faults) -> dict[str, tuple[float, float]]:
    multipliers = {}
    for key, value in faults.section(f"{_PARAMWISE}.custom_keys", given, None).items():
        where = f"{_PARAMWISE}.custom_keys.{key}"
        factors = faults.section(where, value, ("lr_mult", "decay_mult"))
        multipliers[key] = (
            float(faults.number(f"{where}.lr_mult", factors, 1.0, minimum=0.0)),
            float(faults.number(f"{where}.decay_mult", factors, 1.0, minimum=0.0)),
        )
    return multipliers


def read_optimizer_config(given: Any, faults: Faults) -> tuple[float | None, int | None]:
    """`optimizer_config` -> (largest joint gradient norm or None, accumulation steps or None)."""
    known = ("type", "grad_clip", "cumulative_iters", *list_ignored_names("optimizer_config"))
    section = faults.section("optimizer_config", given, known)
    hook = section.get("type", "OptimizerHook")
    if str(hook).replace("Fp16", "") not in ("OptimizerHook", "GradientCumulativeOptimizerHook"):
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
