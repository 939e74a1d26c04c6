"""Activation checkpointing by name: what of a block is kept for the backward pass, and what is computed again.

none        every intermediate result is kept
selective   results of matrix products and of attention are kept, the elementwise rest is computed again
block       only a block's input is kept, and the whole block is computed again
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

_aten = torch.ops.aten
_KEPT_OPS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
_CONTEXTS = {"selective": partial(create_selective_checkpoint_contexts, _KEPT_OPS), "block": noop_context_fn}
POLICIES = ("none", *_CONTEXTS)
AUTO = "auto"
"""Where a training starts, planning puts the fastest policy that fits; everywhere else it is `block`."""


def resolve_policy(checkpointing: str | None, with_cp: bool | None) -> str:
    """Settle what a config asks for by our name, by MMSegmentation's flag, or by neither.

    Args:
        checkpointing: one of POLICIES, AUTO, or None if not given.
        with_cp: True for `block`, False for `none`, or None if not given.

    Returns:
        The policy; `block` if neither is given, and for AUTO.
    """
    if checkpointing == AUTO:
        return "block"
    if checkpointing is not None:
        return checkpointing
    return "none" if with_cp is False else "block"


def find_policy_faults(policy: str, with_cp: bool | None) -> list[str]:
    """Say what is wrong with a policy: that there is no such, or that MMSegmentation's flag says the opposite.

    Args:
        policy: what `resolve_policy` returned.
        with_cp: as there.

    Returns:
        One message a fault, without a full stop.
    """
    if policy not in POLICIES:
        return [f"checkpointing is {policy!r}; use one of {', '.join(map(repr, POLICIES))}"]
    if with_cp is not None and with_cp == (policy == "none"):
        return [
            f"checkpointing is {policy!r} but with_cp is {with_cp}; leave one of them out "
            "(with_cp=True means 'block', with_cp=False means 'none')"
        ]
    return []


def run_block(policy: str, block: Callable[..., Tensor], x_BND: Tensor, branch_scale_2B: Tensor | None) -> Tensor:
    """Run a block so that its backward pass finds what the policy keeps.

    A block draws no random numbers (the factors of drop path come in), so no generator state is restored.

    Args:
        policy: one of POLICIES.
        block: a transformer block, or its forward pass.
        x_BND: its input, (B images, N tokens, D channels).
        branch_scale_2B: its factors of drop path, or None.

    Returns:
        What the block returns.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return block(x_BND, branch_scale_2B)
    return checkpoint(
        block, x_BND, branch_scale_2B, use_reentrant=False, preserve_rng_state=False, context_fn=_CONTEXTS[policy]
    )
