"""Parameter groups of AdamW: layer-wise rate decay, weight-decay exemptions, multipliers by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prettytable import PrettyTable
from torch import nn

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config import KindMultipliers, OptimizerSettings
from ds_seg.config.faults import suggest

from mmcv.utils import _BatchNorm, _InstanceNorm  # isort: skip

EMBEDDINGS = ("cls_token", "pos_embed")
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of one group have in common."""

    lr_scale: float
    weight_decay: float


def layer_id(name: str, depth: int) -> int:
    """The layer a parameter counts to in layer-wise decay.

    Args:
        name: full name, `backbone.` or `decode_head.` first.
        depth: number of the backbone's blocks.

    Returns:
        0 for the embeddings, i + 1 for block i, depth + 1 for everything else.

    Source: OpenGVLab/InternVL `segmentation/mmcv_custom/layer_decay_optimizer_constructor.py`.
    """
    if name.startswith(("backbone.patch_embed.", *(f"backbone.{part}" for part in EMBEDDINGS))):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else depth + 1


def group_key(
    name: str, parameter: nn.Parameter, owner: nn.Module, depth: int, settings: OptimizerSettings
) -> GroupKey:
    """The rate factor and weight decay of one parameter.

    With layer-wise decay, vectors (biases, norms, LayerScale) are never decayed, `cls_token` and `pos_embed` only when
    `settings.decay_embeddings` says so; without it everything is, as in MMCV. ZeRO-3 empties a parameter's data, so its
    own idea of the shape counts.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    attribute = name.rpartition(".")[2]
    lr_scale, weight_decay = 1.0, settings.weight_decay
    if settings.layer_decay_rate is not None:
        lr_scale = settings.layer_decay_rate ** (depth + 1 - layer_id(name, depth))
        if len(shape) <= 1 or (attribute in EMBEDDINGS and not settings.decay_embeddings):
            weight_decay = 0.0
    matching = [key for key in settings.multipliers if key in name]
    if matching:
        lr_mult, decay_mult = settings.multipliers[min(matching, key=lambda key: (-len(key), key))]
    else:
        lr_mult, decay_mult = multipliers_of_kind(attribute, owner, settings.kinds)
    return GroupKey(lr_scale * lr_mult, weight_decay * decay_mult)


def multipliers_of_kind(attribute: str, owner: nn.Module, kinds: KindMultipliers) -> tuple[float, float]:
    """The factors of the rate and of the weight decay that a parameter gets for what it is.

    Source: mmcv 1.7 `mmcv/runner/optimizer/default_constructor.py`; RMSNorm counts as a norm too.
    """
    is_norm = isinstance(owner, _NORMS)
    is_bias = attribute == "bias" and not is_norm
    if is_norm:
        decay_mult = kinds.norm_decay_mult
    elif isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups:
        decay_mult = kinds.dwconv_decay_mult
    else:
        decay_mult = kinds.bias_decay_mult if is_bias else 1.0
    return kinds.bias_lr_mult if is_bias else 1.0, decay_mult


def build_param_groups(
    named_modules: Iterable[tuple[str, nn.Module]], depth: int, settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """AdamW parameter groups of everything that is trainable.

    Args:
        named_modules: all modules of one engine with their full names, as `named_modules(prefix=...)` gives them.
        depth: number of the backbone's blocks.
        settings: rates and decays.

    Returns:
        One group for each rate factor and weight decay, in order of first appearance. Each has `base_lr`
        (before the schedule), `layers` (a description) and `names` (of `params`) beside torch's own keys.
    """
    groups: dict[GroupKey, dict[str, Any]] = {}
    for name, parameter, owner in _list_trainable(named_modules):
        key = group_key(name, parameter, owner, depth, settings)
        base_lr = settings.lr * key.lr_scale
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "lr": base_lr,
                "base_lr": base_lr,
                "weight_decay": key.weight_decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    for group in groups.values():
        group["layers"] = describe_layers(group["names"], depth)
    return list(groups.values())


def _list_trainable(named_modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name, parameter and the module that has it; a shared one once."""
    seen = set()
    for prefix, owner in named_modules:
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield name, parameter, owner


def find_idle_multipliers(names: Iterable[str], settings: OptimizerSettings) -> list[str]:
    """Keys of `custom_keys` that no parameter has in its name, a sentence each: they do nothing, as in MMCV.

    Args:
        names: full names of all parameters, also of frozen ones.
        settings: has the keys.
    """
    names = list(names)
    parts = {part for name in names for part in name.split(".")}
    return [
        f"optimizer.paramwise_cfg.custom_keys.{key} does nothing: no parameter has {key!r} in its name."
        f"{suggest(key, parts)}"
        for key in settings.multipliers
        if not any(key in name for name in names)
    ]


def describe_layers(names: Iterable[str], depth: int) -> str:
    """What the named parameters belong to, such as `embeddings, blocks 0-47`."""
    names = list(names)
    layers = {layer_id(name, depth) for name in names}
    blocks = sorted(layer - 1 for layer in layers if 0 < layer <= depth)
    gaps = [i for i in range(1, len(blocks)) if blocks[i] > blocks[i - 1] + 1]
    runs = [blocks[start:end] for start, end in itertools.pairwise([0, *gaps, len(blocks)]) if end > start]
    parts = ["embeddings"] if 0 in layers else []
    parts += [f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}" for run in runs]
    last = [name for name in names if layer_id(name, depth) == depth + 1]
    parts += ["final layers"] if any(name.startswith("backbone.") for name in last) else []
    parts += ["heads"] if any(not name.startswith("backbone.") for name in last) else []
    return ", ".join(parts)


def format_groups(groups: Iterable[dict[str, Any]]) -> str:
    """The realised groups as a table, read back from the optimizers after they were wrapped."""
    table = PrettyTable(["layers", "base lr", "weight decay", "tensors"], align="r")
    table.align["layers"] = "l"
    for group in groups:
        table.add_row([group["layers"], f"{group['base_lr']:.3e}", f"{group['weight_decay']:g}", len(group["names"])])
    return table.get_string()
