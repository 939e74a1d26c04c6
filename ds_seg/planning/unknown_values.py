"""What a computation on tensors without data gets where it asks for their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_EQUALITIES = (_aten.eq.Scalar, _aten.eq.Tensor)


class SelectEverything(TorchDispatchMode):
    """A context inside FakeTensorMode in which every mask selects every element, which is when a step costs most.

    Losses pick pixels by their labels (Lovász, OHEM, binary cross-entropy) and ask whether there are any. A number is 1
    here, and what is asked is true, unless it is whether two values are equal.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or make up what it would find out."""
        if func is _aten._local_scalar_dense.default and args[0].constant is None:
            return _make_up(args[0])
        if func is _aten.nonzero.default:
            return _find_everywhere(args[0])
        if func is _aten.masked_select.default:
            return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        if func is _aten.index.Tensor:
            args = (args[0], _select_everything(args[1]))
        result = func(*args, **(kwargs or {}))
        if func in _EQUALITIES:
            result.is_equality = True
        return result


def _make_up(scalar: Tensor) -> bool | int | float:
    if scalar.dtype == torch.bool:
        return not hasattr(scalar, "is_equality")
    return 1.0 if scalar.is_floating_point() else 1


def _find_everywhere(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def _select_everything(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    chosen: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        chosen += _find_everywhere(index).unbind(1) if is_mask else [index]  # type: ignore[arg-type]
    return chosen
