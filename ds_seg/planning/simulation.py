"""One training step of our own modules on tensors without data: what it allocates, computes and moves.

A few of the backbone's blocks are simulated, since every further one adds the same; the heads at full size.

Shape suffixes: B images, H W pixels, C channels of an image, 1 label; D channels, h w a feature map.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

import ds_seg.openmmlab  # noqa: F401  (before mmcv)
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.heads import list_losses
from ds_seg.models.probe import draw_features
from ds_seg.models.sync_batchnorm import SyncBatchNorm
from ds_seg.planning.allocations import ATTENTION, AllocationTracker
from ds_seg.planning.gradient_sums import SumInPlace
from ds_seg.planning.model_size import build_on_meta
from ds_seg.planning.unknown_values import SelectEverything

PARTS = ("activations", "backward of a block", "head's activations", "logits and loss")
KEPT, BACKWARD, HEAD, FULL_SIZE = PARTS
_BLOCKS_BELOW_TAPS = 4
"""With fewer blocks, the peak of a small model is where its patches and positions get their gradients."""
Parts = Counter[str]
"""Part of a step -> bytes or FLOPs."""


@dataclass(frozen=True)
class StepSetting:
    """What the memory of a step depends on beside the model."""

    micro_batch: int
    crop_size_px: tuple[int, int]
    checkpointing: str
    """One of `models.checkpointing.POLICIES`."""
    dtype: torch.dtype
    """Of the backbone."""
    fused_norms: bool
    """Count RMSNorm as one kernel, as GPUs have it; torch's CPU version keeps FP32 copies."""
    zero3_linear: bool = True
    """DeepSpeed's linear function is in the place of torch's; it keeps its input even where the weight is frozen."""


@dataclass(frozen=True)
class Trace:
    """What the backbone or the heads allocate and compute for one micro-batch; `+` and `*` go entry by entry."""

    kept: Parts
    """Bytes between forward and backward."""
    peak: Parts
    """Bytes at the highest moment of both passes."""
    flops: Parts
    """`forward`, and `all`: forward, backward and what is computed again; `attention` is attention's part of all."""
    moved: Parts
    """`bytes` that are read and written by operators other than attention, products and convolutions."""

    def __add__(self, other: Trace) -> Trace:
        return Trace(*(_combine(a, b, 1) for a, b in zip(self._fields(), other._fields(), strict=True)))

    def __mul__(self, factor: float) -> Trace:
        return Trace(*(_combine(Counter(), a, factor) for a in self._fields()))

    def _fields(self) -> tuple[Parts, ...]:
        return self.kept, self.peak, self.flops, self.moved


def _combine(a: Parts, b: Parts, factor: float) -> Parts:
    return Counter({key: a[key] + factor * b[key] for key in dict.fromkeys([*a, *b])})  # type: ignore[misc]


def extrapolate(first: Trace, second: Trace, steps: float) -> Trace:
    """What lies `steps` times the difference of two traces behind the first, where all grow in proportion."""
    return first * (1 - steps) + second * steps


def simulate_backbone(model_cfg: Mapping[str, Any], setting: StepSetting) -> Trace:
    """Simulate forward and backward of a few of the backbone's blocks; every further one adds what it keeps."""
    backbone = model_cfg["backbone"]
    blocks = backbone["out_indices"][-1] + 1  # those behind the last tap don't run
    few = min(blocks, len(backbone["out_indices"]) + _BLOCKS_BELOW_TAPS)
    plain = {**model_cfg, "backbone": {**backbone, "out_indices": [0], "with_fpn": False}}
    short, longer = (_simulate_depth(plain, depth, setting) for depth in (2, 3))
    block = longer + short * -1
    return _simulate_depth(model_cfg, few, setting) + replace(block, peak=block.kept) * (blocks - few)


def _simulate_depth(model_cfg: Mapping[str, Any], depth: int, setting: StepSetting) -> Trace:
    tracker = AllocationTracker(lambda _, phase: phase)
    shorter = _with_depth(model_cfg, depth, setting.checkpointing)
    with torch.device("meta"):
        built = build_backbone(shorter).to(setting.dtype)
    with _without_data(), _linear_of(setting):
        backbone = _prepare(built, setting)
        images_BCHW = torch.empty(setting.micro_batch, built.in_chans, *setting.crop_size_px, dtype=setting.dtype)
        with tracker, SumInPlace():
            tracker.enter(KEPT)
            features = backbone(images_BCHW)
            kept, forward_flops = Counter(tracker.live), tracker.flops.total()
            tracker.enter(BACKWARD)
            trained = [feature for feature in features if feature.requires_grad]
            if trained:
                torch.autograd.backward(trained, [torch.empty_like(feature) for feature in trained])
    peak = max(tracker.peaks.values(), key=Parts.total)
    return Trace(kept, peak, *_summarise_work(forward_flops, tracker))


def simulate_heads(model_cfg: Mapping[str, Any], setting: StepSetting) -> Trace:
    """Simulate heads and losses, forward and backward, for one micro-batch.

    Raises:
        ValueError: BatchNorm has a single value a channel: the micro-batch is too small for one process alone.
    """

    def classify(tensor: Tensor, phase: str) -> str:
        return FULL_SIZE if set(setting.crop_size_px) <= set(tensor.shape) else phase

    tracker = AllocationTracker(classify)
    backbone, built = build_on_meta(model_cfg)
    trainable = any(parameter.requires_grad for parameter in backbone.parameters())
    with _without_data(), SelectEverything(), _linear_of(setting):
        heads = _prepare(built, setting)
        drawn = draw_features(backbone, setting.micro_batch, setting.crop_size_px, torch.device("cpu"))
        features = [feature.detach().to(setting.dtype).requires_grad_(trainable) for feature in drawn]
        del drawn
        labels_B1HW = torch.zeros(setting.micro_batch, 1, *setting.crop_size_px, dtype=torch.int64)
        with tracker, SumInPlace():
            tracker.enter(HEAD)
            entries = heads.losses(features, [{}] * setting.micro_batch, labels_B1HW)
            kept, forward_flops = Counter(tracker.live), tracker.flops.total()
            torch.stack(list_losses(entries)).sum().backward()
    return Trace(kept, tracker.peaks[HEAD], *_summarise_work(forward_flops, tracker))


def _summarise_work(forward_flops: int, tracker: AllocationTracker) -> tuple[Parts, Parts]:
    flops = Counter(forward=forward_flops, all=tracker.flops.total(), attention=tracker.flops[ATTENTION])
    return flops, Counter(bytes=tracker.moved_bytes)


def _with_depth(model_cfg: Mapping[str, Any], depth: int, checkpointing: str) -> dict[str, Any]:
    """The model with so many blocks, the last of them tapped."""
    backbone = {key: value for key, value in model_cfg["backbone"].items() if key != "with_cp"}
    taps = len(backbone["out_indices"])
    backbone.update(depth=depth, out_indices=list(range(depth - taps, depth)), checkpointing=checkpointing)
    return {**model_cfg, "backbone": backbone}


def _prepare(root: nn.Module, setting: StepSetting) -> nn.Module:
    """Give a module on the meta device tensors that pass for the CPU's, and training mode.

    A gradient goes as soon as it is complete, as under ZeRO-3: the shares of parameters and gradients that a process
    holds are counted elsewhere.
    """
    if setting.fused_norms:
        _fuse_norms(root)
    _isolate_norms(root)
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            module._parameters[name] = fake
            if fake.requires_grad:
                fake.register_post_accumulate_grad_hook(_drop_gradient)
    return root.train()


def _fuse_norms(root: nn.Module) -> None:
    """Put LayerNorm in the place of RMSNorm: it keeps for the backward pass what the fused RMSNorm of GPUs keeps."""
    for module in list(root.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RMSNorm):
                norm = nn.LayerNorm(child.normalized_shape, device="meta", dtype=child.weight.dtype, bias=False)
                setattr(module, name, norm.requires_grad_(child.weight.requires_grad))


class _LocalBatchNorm(_BatchNorm):
    """SyncBatchNorm without the other ranks: a training simulates on one of them, in a world that is up."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape: the real module has checked it by then."""


def _isolate_norms(root: nn.Module) -> None:
    for module in list(root.modules()):
        for name, child in module.named_children():
            if isinstance(child, SyncBatchNorm):
                norm = _LocalBatchNorm(child.num_features, child.eps, child.momentum, device="meta")
                norm._parameters, norm._buffers = child._parameters, child._buffers
                norm.track_running_stats = child.track_running_stats
                setattr(module, name, norm)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _without_data() -> FakeTensorMode:
    """A context in which new tensors have a shape and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def _linear_of(setting: StepSetting) -> Iterator[None]:
    """A context in which `nn.Linear` computes as in the training."""
    found = nn.functional.linear
    if setting.zero3_linear:
        nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        nn.functional.linear = found
