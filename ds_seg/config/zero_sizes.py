"""The sizes in a DeepSpeed JSON that may be "auto": set from the size of the backbone and from the memory to spare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_seg.config.deepspeed_json import uses_bf16
from ds_seg.config.faults import Faults

LIVE_SIZES = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
ZERO_SIZES = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    *LIVE_SIZES,
)
DEFAULT_LIVE_BYTES = 2e9
"""What whole parameters may take where nobody has computed what there is to spare."""
_LARGEST_BUCKET = 200_000_000
_LARGEST_SUB_GROUP = 100_000_000
_BLOCKS_A_BUCKET = 3
_REST = 1.05
"""What is no matrix of a block adds a few percent: biases, norms, embeddings."""
_BLOCKS_IN_USE = 3
"""One that is computed, one that is fetched for it, one whose release is under way."""


def count_block(backbone: Mapping[str, Any]) -> int:
    """Parameters in the matrices of one transformer block."""
    width = int(backbone.get("embed_dim", 3200))
    return int((4 + 2 * float(backbone.get("mlp_ratio", 4))) * width**2)


def count_backbone(backbone: Mapping[str, Any]) -> int:
    """Parameters of the backbone, rounded up."""
    pyramid = 12 * int(backbone.get("embed_dim", 3200)) ** 2 if backbone.get("with_fpn") else 0
    return int(_REST * (int(backbone.get("depth", 48)) * count_block(backbone) + pyramid))


def compute_zero_sizes(backbone: Mapping[str, Any], live_bytes: float, parameter_bytes: int) -> dict[str, int]:
    """The sizes that suit a backbone.

    A parameter is kept from the forward to the backward pass if it is used again within the reuse distance, which
    counts what is used in between, both times. So a distance of twice the backbone gathers nothing twice, and one of
    2 n keeps the last n parameters. A frozen trunk is not used again, but DeepSpeed 0.19.8 takes it to be; there the
    distance is 0.

    What is gathered arrives in a buffer as large as a block, which stands beside the live parameters.

    Args:
        backbone: its section of the config.
        live_bytes: memory of a process that whole parameters may take.
        parameter_bytes: of one parameter.

    Returns:
        Numbers of parameters, for every name in ZERO_SIZES.
    """
    block, everything = count_block(backbone), count_backbone(backbone)
    if backbone.get("freeze_vit") and not backbone.get("unfreeze_pos_embed"):
        live_bytes = 0.0
    live = min(max(int(live_bytes / parameter_bytes - _REST * block), _BLOCKS_IN_USE * block), everything)
    return {
        "reduce_bucket_size": min(_BLOCKS_A_BUCKET * block, _LARGEST_BUCKET),
        "sub_group_size": min(block, _LARGEST_SUB_GROUP),
        "stage3_prefetch_bucket_size": block,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": 2 * (live if live == everything else live - _BLOCKS_IN_USE * block),
    }


def find_auto_sizes(zero: Any, faults: Faults) -> tuple[str, ...]:
    """Names of the sizes that are "auto"; a fault for an "auto" that nothing settles."""
    if not isinstance(zero, Mapping):
        return ()
    for key, value in zero.items():
        if value == "auto" and key not in ZERO_SIZES:
            faults.add(
                f"deepspeed.zero_optimization.{key}",
                f"got 'auto', which is known for {', '.join(ZERO_SIZES)} only. Write a value, or remove it.",
            )
    return tuple(name for name in ZERO_SIZES if zero.get(name) == "auto")


def settle_zero_sizes(
    deepspeed: Mapping[str, Any], names: tuple[str, ...], backbone: Mapping[str, Any], live_bytes: float
) -> dict[str, Any]:
    """The DeepSpeed config with numbers for `names`; all other numbers stay."""
    if not names:
        return dict(deepspeed)
    sizes = compute_zero_sizes(backbone, live_bytes, parameter_bytes=2 if uses_bf16(deepspeed) else 4)
    return {**deepspeed, "zero_optimization": {**deepspeed["zero_optimization"], **{n: sizes[n] for n in names}}}
