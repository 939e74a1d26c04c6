"""Modules that stay FP32 whatever their surroundings ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ds_seg.errors import ConfigError


class Float32Module(nn.Module):
    """A mixin whose parameters and buffers are FP32 by construction.

    `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)`, called on the module or on any parent, move it
    but don't change the dtype of what floats: a decode head's statistics, weights and updates are too
    fine for 8 or 11 bits of mantissa.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                # from the original: a round trip through the narrower dtype would lose its low bits
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)

    def make_float32(self) -> None:
        """Bring every parameter and buffer to FP32; called once, at the end of a constructor.

        Raises:
            ConfigError: the module was built under `deepspeed.zero.Init`, which partitioned it.
        """
        if any(hasattr(parameter, "ds_id") for parameter in self.parameters()):
            raise ConfigError(
                f"{type(self).__name__} was built inside deepspeed.zero.Init, which partitions its parameters and "
                "casts them to the backbone's dtype. Heads are replicated in FP32: build them outside that context."
            )
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.float()


def without_autocast(device: torch.device) -> Any:
    """A context in which operations on `device` keep their inputs' dtype."""
    return torch.autocast(device_type=device.type, enabled=False)
