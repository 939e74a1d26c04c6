"""Follow what a computation allocates and moves, operator by operator, on tensors that have no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Classify = Callable[[torch.Tensor, str], str]
"""(a new tensor, the phase that it is made in) -> the part that its bytes belong to."""
_aten = torch.ops.aten
_SAME_FORMULA = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
"""Tensors without data take the CPU's attention kernel, which torch 2.13 has no formula for."""
ATTENTION, PRODUCTS = "attention", "products"
_WITHOUT_TRAFFIC = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.detach}


class AllocationTracker(TorchDispatchMode):
    """A context in which every storage that an operator makes is counted until it is freed.

    torch has a tracker too (`torch.distributed._tools.mem_tracker`); it tells apart parameters, gradients and
    activations of modules it knows, not the parts of a step that a plan names. Its FlopCounterMode follows modules by
    hooks that keep recomputed activations alive, so that its formulas are called from here.

    Attributes:
        live: bytes by part, now.
        flops: of attention, and of matrix products and convolutions so far, by the formulas of torch's
            FlopCounterMode.
        moved_bytes: what all other operators have read and written so far; views move nothing.
        peaks: phase -> bytes by part at the moment in it when their sum was highest.
    """

    def __init__(self, classify: Classify) -> None:
        super().__init__()
        self.classify = classify
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.flops: Counter[str] = Counter()
        self.moved_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def enter(self, phase: str) -> None:
        """Say what is computed from now on."""
        self._phase = phase
        self.peaks.setdefault(phase, Counter(self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and follow what it returns."""
        results = func(*args, **(kwargs or {}))
        self._count_work(func, args, kwargs or {}, results)
        inputs = None
        for result in tree_leaves(results):
            if not isinstance(result, torch.Tensor):
                continue
            storage = result.untyped_storage()
            if storage in self._known:
                continue
            if inputs is None:
                inputs = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if not any(storage is known for known in inputs):  # a view of what was there before, such as a weight
                self._follow(result, storage)
        return results

    def _count_work(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        operator = getattr(func, "_overloadpacket", func)
        formula = flop_registry.get(_SAME_FORMULA.get(operator, operator))
        if formula:
            kind = ATTENTION if "scaled_dot_product" in str(operator) else PRODUCTS
            self.flops[kind] += formula(*args, **kwargs, out_val=results)
        elif func.namespace == "aten" and not func.is_view and operator not in _WITHOUT_TRAFFIC:
            tensors = [x for x in tree_leaves((args, kwargs, results)) if isinstance(x, torch.Tensor)]
            self.moved_bytes += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)

    def _follow(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
        part, size = self.classify(tensor, self._phase), storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._release, part, size)
        self.live[part] += size
        if self.live.total() > self.peaks[self._phase].total():
            self.peaks[self._phase] = Counter(self.live)

    def _release(self, part: str, size: int) -> None:
        self.live[part] -= size
