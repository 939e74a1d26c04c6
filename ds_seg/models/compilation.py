"""Transformer blocks through torch.compile, each by itself: they share one compilation, and ZeRO-3 keeps its hooks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let every block run compiled where gradients are wanted, and as it is where none are.

    An evaluation has windows of several shapes and batch sizes, each of which would be compiled anew.

    Args:
        blocks: ZeRO-3 leaf modules, whose parameters are whole while their `forward` runs.
    """
    for block in blocks:
        block.forward = _CompiledForward(block)  # type: ignore[method-assign, assignment]


class _CompiledForward:
    def __init__(self, block: nn.Module) -> None:
        self.eager = block.forward
        self.compiled = torch.compile(block.forward, dynamic=False)

    def __call__(self, x_BND: Tensor, branch_scale_2B: Tensor | None = None) -> Tensor:
        run = self.compiled if torch.is_grad_enabled() else self.eager
        return run(x_BND, branch_scale_2B)
