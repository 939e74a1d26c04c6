"""How much room a checkpoint takes."""

from __future__ import annotations

_FP32_BYTES = 4
_ADAMW_BYTES = 3 * _FP32_BYTES
"""A trained weight in FP32 and its two moments."""


def checkpoint_bytes(
    *, trained: int, frozen: int, heads: int, head_buffers: int = 0, frozen_dtype_bytes: int = 2, averaged: bool = False
) -> int:
    """Bytes of one checkpoint of all ranks together, but for some kilobytes of names.

    While a checkpoint is written, checkpoint_config.max_keep_ckpts others and perhaps the best one lie beside it. A
    backbone that is frozen as a whole is on the disk once for all of them.

    Args:
        trained: parameters of the backbone that are trained.
        frozen: parameters of the backbone that are not.
        heads: parameters of the heads, all of them trained.
        head_buffers: values of the heads' buffers, such as BatchNorm's statistics.
        frozen_dtype_bytes: bytes of one value of the backbone; 2 in bf16.
        averaged: whether averages of the weights are kept (EMAHook).
    """
    moved = trained + heads
    averages = _FP32_BYTES * moved if averaged else 0
    return _ADAMW_BYTES * moved + averages + frozen_dtype_bytes * frozen + _FP32_BYTES * head_buffers


def format_gib(count: int) -> str:
    """A number of bytes for a message: `94.49 GiB`, `3 MiB`."""
    if count < 1 << 30:
        return f"{count / (1 << 20):.3g} MiB"
    return f"{count / (1 << 30):.2f} GiB"
