"""Let autograd sum gradients in place although something follows what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_TENSOR_ALONE, _STORAGE_ALONE = 4, 2
"""References to a gradient, and to its storage, that the first mode sees where autograd alone holds it (torch 2.13)."""


class SumInPlace(TorchDispatchMode):
    """A context, to be entered last, in which a gradient is added to another as if no mode were on.

    Where a tensor has several uses autograd adds up their gradients, in the memory of the first if nothing else needs
    it. Under any mode it takes new memory for each sum instead.

    Source: torch `torch/csrc/autograd/input_buffer.cpp`, `can_accumulate_inplace`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or its form in place."""
        if func is _aten.add.Tensor and _is_backward() and _can_hold_sum(args):
            func = _aten.add_.Tensor
        return func(*args, **(kwargs or {}))


def _is_backward() -> bool:
    """Whether gradients are computed, and nothing is computed again for them."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _can_hold_sum(summands: Sequence[Any]) -> bool:
    """Whether the first is a whole tensor of the sum's shape that nothing else refers to."""
    if not all(isinstance(summand, Tensor) for summand in summands) or summands[0].shape != summands[1].shape:
        return False
    storage = summands[0].untyped_storage()
    return (
        storage.nbytes() == summands[0].nbytes
        and summands[0]._use_count() <= _TENSOR_ALONE
        and torch._C._storage_Use_Count(storage._cdata) <= _STORAGE_ALONE
    )
