"""Whether the heads of a config take in what the backbone puts out; answered before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_seg.config.head_fields import classifying_heads
from ds_seg.errors import ConfigError


def validate_head_channels(model_cfg: Mapping[str, Any], backbone_out_channels: Sequence[int]) -> None:
    """Check what every head takes in against what the backbone puts out.

    Args:
        model_cfg: the `model` dict, as for `build_heads`.
        backbone_out_channels: channels of every map of the backbone, in order.

    Raises:
        ConfigError: every mismatch, each with its field, what it says and what fits.
    """
    heads = classifying_heads(model_cfg)
    faults = [fault for field, cfg in heads if (fault := _find_fault(field, cfg, backbone_out_channels))]
    if faults:
        raise ConfigError("The heads don't fit the backbone: " + "; ".join(faults) + ".")


def _find_fault(field: str, cfg: Mapping[str, Any], backbone_out_channels: Sequence[int]) -> str | None:
    in_index = cfg.get("in_index", -1)
    indices = in_index if isinstance(in_index, (list, tuple)) else [in_index]
    if not all(isinstance(index, int) for index in indices):
        return f"{field}.in_index is {in_index!r}, but must be the number of a map, or a list of them"
    count = len(backbone_out_channels)
    outside = [i for i in indices if not -count <= i < count]
    if outside:
        return (
            f"{field}.in_index names map {outside[0]}, but the backbone puts out {count} "
            "(one for each of model.backbone.out_indices)"
        )
    per_map = [backbone_out_channels[i] for i in indices]
    wanted = per_map[0] if isinstance(in_index, int) else per_map
    got = cfg.get("in_channels")
    if (list(got) if isinstance(got, (list, tuple)) else got) == wanted:
        return None
    also = " and channels to the same" if cfg.get("num_convs") == 0 else ""
    return (
        f"{field}.in_channels is {got}, but the backbone's map {in_index} has {wanted} "
        f"channels. Set {field}.in_channels={wanted}{also}"
    )
