"""The numerics guard: every tensor of both engines has the dtype that the run promised.

A cast behind our back (a hook, a custom head, `tensor.data = ...`) raises no error of its own: training goes on,
and only the result is worse. The checks read dtypes and nothing else: no parameter is gathered, no device is waited
for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import nn

from ds_seg import distributed
from ds_seg.engine.engines import Engines
from ds_seg.errors import PrecisionError

Named = Iterable[tuple[str, torch.Tensor, torch.dtype]]
"""(what it is, the tensor, the dtype it must have)."""

_SHOWN_FAULTS = 5


def validate_precision(engines: Engines) -> None:
    """Check heads, backbone, FP32 masters and optimizer states; a collective over all ranks.

    Raises:
        PrecisionError: on every rank, if a tensor of any rank has another dtype than promised.
    """
    own = _find_faults([*_heads(engines), *_backbone(engines)])
    faults = list(dict.fromkeys(fault for of_rank in distributed.gather_objects(own) for fault in of_rank))
    _raise_if_any(faults)


def validate_head_gradients(heads: nn.Module) -> None:
    """Check the gradients that are about to be clipped and stepped with; no collective.

    Raises:
        PrecisionError: on this rank, if one of them is not FP32.
    """
    gradients = ((f"gradient of {name}", parameter.grad) for name, parameter in heads.named_parameters())
    _raise_if_any(_find_faults((name, grad, torch.float32) for name, grad in gradients if grad is not None))


def _heads(engines: Engines) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    for name, parameter in engines.heads.named_parameters():
        yield f"parameter {name}", parameter, torch.float32
        for key, value in engines.head_optimizer.state.get(parameter, {}).items():
            yield f"optimizer state {key} of {name}", value, torch.float32
    for name, buffer in engines.heads.named_buffers():
        yield f"buffer {name}", buffer, torch.float32


def _backbone(engines: Engines) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    for name, parameter in engines.backbone.module.named_parameters():
        yield f"parameter backbone.{name}", parameter, engines.dtype
        yield f"shard of backbone.{name}", parameter.ds_tensor, engines.dtype  # type: ignore[attr-defined]
    if not engines.trainable_backbone:
        return
    smallest = min(engines.trainable_backbone, key=lambda parameter: parameter.ds_numel)  # type: ignore[attr-defined]
    # this one is copied where the optimizer is offloaded; all masters were made at once and have one dtype
    yield "FP32 master weights of the backbone", safe_get_local_fp32_param(smallest), torch.float32
    for flat, state in engines.backbone.basic_optimizer.state.items():
        yield "FP32 master weights of the backbone", flat, torch.float32
        for key, value in state.items():
            if isinstance(value, torch.Tensor):  # DeepSpeed's CPU optimizer counts steps in a plain number
                yield f"optimizer state {key} of the backbone", value, torch.float32


def _find_faults(tensors: Named) -> list[str]:
    return [
        f"{name} is {tensor.dtype}, want {wanted}"
        for name, tensor, wanted in tensors
        if tensor.is_floating_point() and tensor.dtype != wanted
    ]


def _raise_if_any(faults: list[str]) -> None:
    if not faults:
        return
    more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    raise PrecisionError(
        f"The precision is not what the run promised: {'; '.join(faults[:_SHOWN_FAULTS])}{more}. Something cast them "
        "after they were built: look for .half(), .bfloat16(), .to(dtype) or a hook in custom heads and backbones. "
        "Nothing was saved from this state: remove the cast and start again; --resume auto goes on from the last "
        "checkpoint."
    )
