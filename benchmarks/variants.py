"""The same training step three times: ds_seg's two engines, PyTorch FSDP2 beside DDP, and plain DDP; two also compiled.

All have FP32 master weights and AdamW state, an FP32 head, one joint clipping and the same parameter groups. ds_seg and
FSDP2 compute the backbone in bf16 parameters, DDP in FP32 parameters under bf16 autocast; FSDP2 and DDP reduce
gradients in FP32, ds_seg in what its DeepSpeed JSON says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import deepspeed
import torch
from phases import Timed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from workload import draw_matrices, draw_matrix

import ds_seg.openmmlab  # noqa: F401
from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.engines import Engines, build_adamw, build_modules
from ds_seg.engine.groups import build_param_groups
from ds_seg.engine.step import TwoEngineStep, noise_seed, total_loss
from ds_seg.models.compilation import compile_blocks
from ds_seg.models.heads import build_heads

from mmseg.models.builder import build_backbone  # isort: skip


class Step(Protocol):
    """One training step of a variant."""

    timed: Timed

    def __call__(self, index: int, batch: MicroBatch) -> tuple[float, float]:
        """Train on this rank's part of a global batch: the mean loss over ranks, the joint norm before clipping."""
        ...


def build_ds_seg(run: RunConfig) -> Step:
    """The product's own engines and step."""
    backbone, heads = build_modules(run)
    for name, parameter in backbone.named_parameters():
        if len(parameter.ds_shape) > 1:
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                if distributed.is_main():
                    parameter.copy_(draw_matrix(name, parameter.ds_shape, distributed.device()))
    return TwoEngines(Engines(backbone, heads, run, training=True), run)


class TwoEngines:
    """ds_seg's own step."""

    def __init__(self, engines: Engines, run: RunConfig) -> None:
        self.train = TwoEngineStep(engines, run)
        self.timed: Timed = {
            "forward": [(engines.backbone, "forward"), (engines.heads_ddp, "forward")],
            "backward": [(engines.backbone, "backward")],
            "optimizer": [(engines.backbone, "step"), (engines.head_optimizer, "step")],
        }

    def __call__(self, index: int, batch: MicroBatch) -> tuple[float, float]:
        """Train on one global batch; a collective."""
        result = self.train(index, [batch], scheduled_steps=index)
        return result.losses["loss"], result.grad_norm


def build_fsdp2(run: RunConfig) -> Step:
    """FSDP2 over every block and the rest of the backbone (parameters freed after the forward), DDP for the head."""
    mesh = init_device_mesh(distributed.device().type, (run.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    backbone = _build_backbone(run)
    if run.compile:
        compile_blocks(backbone)  # as ours are: what `selective` keeps is chosen inside, or nothing would be kept
    for block in backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(backbone, mesh=mesh, mp_policy=policy)
    return PlainStep(run, backbone, backbone)


def build_ddp(run: RunConfig) -> Step:
    """DDP over the whole model, its FP32 backbone under bf16 autocast."""
    backbone = _build_backbone(run)
    wrapped = DistributedDataParallel(backbone, device_ids=_device_ids(), gradient_as_bucket_view=True)
    return PlainStep(run, wrapped, backbone, autocast=True)


class PlainStep:
    """One step as a careful PyTorch loop would write it.

    Args:
        run: the run.
        backbone: on its device, wrapped.
        masters: the same without what wraps it: the module whose FP32 parameters AdamW updates.
        autocast: whether the backbone computes under bf16 autocast, not in bf16 parameters.
    """

    def __init__(self, run: RunConfig, backbone: nn.Module, masters: nn.Module, *, autocast: bool = False) -> None:
        self.run, self.device, self.backbone, self.autocast = run, distributed.device(), backbone, autocast
        torch.manual_seed(run.seed)
        heads = build_heads(run.model).to(self.device)
        self.heads = DistributedDataParallel(heads, device_ids=_device_ids())
        self.masters = list(masters.parameters())
        self.head_parameters = list(heads.parameters())
        depth = int(run.model.backbone.depth)
        self.optimizers = [
            build_adamw(build_param_groups(modules, depth, run.optimizer), run.optimizer)
            for modules in (masters.named_modules(prefix="backbone"), heads.named_modules())
        ]
        self.timed: Timed = {
            "forward": [(self.backbone, "forward"), (self.heads, "forward")],
            "backward": [(torch.autograd, "backward")],
            "optimizer": [(optimizer, "step") for optimizer in self.optimizers],
        }

    def __call__(self, index: int, batch: MicroBatch) -> tuple[float, float]:
        """Train on one global batch; a collective."""
        for optimizer in self.optimizers:
            self.run.schedule.set_rates(optimizer.param_groups, index)
        loss = self._forward_backward(batch)
        masters_norm = self._norm(self.masters)
        mean_loss = distributed.reduce_sum(loss / self.run.world_size).item()
        norm = math.hypot(masters_norm, self._norm(self.head_parameters))
        if math.isfinite(norm) and math.isfinite(mean_loss):
            for parameters in (self.masters, self.head_parameters):
                clip_grads_with_norm_(parameters, self.run.clip_norm or math.inf, torch.tensor(norm))
            self._update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return mean_loss, norm

    def _forward_backward(self, batch: MicroBatch) -> torch.Tensor:
        images = batch.images_B3HW.to(self.device, non_blocking=True)
        labels = batch.labels_B1HW.to(self.device, non_blocking=True)
        seeds = [noise_seed(self.run.seed, position) for position in batch.positions]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features = self.backbone(images if self.autocast else images.bfloat16(), sample_seeds=seeds)
        entries = self.heads(features, batch.metas, labels)
        loss = total_loss({name: value.float().mean() for name, value in entries.items()})
        loss.backward()
        return loss.detach()

    def _norm(self, parameters: Sequence[nn.Parameter]) -> float:
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _device_ids() -> list[torch.device] | None:
    device = distributed.device()
    return None if device.type == "cpu" else [device]


def _build_backbone(run: RunConfig) -> nn.Module:
    device = distributed.device()
    with device:
        backbone = build_backbone({**run.model.backbone, "pretrained": None})
    draw_matrices(backbone, device)
    return backbone.train()


VARIANTS: dict[str, Callable[[RunConfig], Step]] = {"ds_seg": build_ds_seg, "fsdp2": build_fsdp2, "ddp": build_ddp}
