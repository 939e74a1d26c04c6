"""The two engines of a run: a ZeRO-3 backbone and replicated FP32 heads, built and held together."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch._dynamo  # optimizers, DDP and ZeRO-3 import it at their first call; here the collector is paused meanwhile
from deepspeed.runtime import compiler
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.config.deepspeed_json import offloaded_share, suit_device
from ds_seg.engine.adamw import RATE_GROUPS, build_adamw, build_backbone_adamw, build_resident_adamw
from ds_seg.engine.groups import build_param_groups
from ds_seg.engine.zero3 import local_master, use_joint_norm
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.compilation import compile_blocks
from ds_seg.models.head_channels import validate_head_channels
from ds_seg.models.heads import SegmentationHeads, build_heads
from ds_seg.models.layers import Block
from ds_seg.models.weight_stream import Stretch

# Shape suffixes: B images, K classes, H W pixels, 3 colours.


class Engines:
    """Backbone under DeepSpeed ZeRO-3, heads under DistributedDataParallel, one AdamW for each.

    Attributes:
        backbone: DeepSpeed engine; its module's parameters exist only as shards.
        heads: the decode and auxiliary heads, FP32, the same on every rank.
        heads_ddp: `heads` under DistributedDataParallel; only where the engines train.
        head_optimizer: AdamW of `heads`.
        trainable_backbone: the backbone's parameters that a step moves; empty when it is frozen.
    """

    def __init__(self, backbone: nn.Module, heads: SegmentationHeads, run: RunConfig, *, training: bool) -> None:
        self.device = distributed.device()
        self.dtype = run.dtype
        depth = len(backbone.blocks)
        self.trainable_backbone = [p for p in backbone.parameters() if p.requires_grad] if training else []
        self.backbone = _wrap_backbone(backbone, depth, run, optimize=bool(self.trainable_backbone))
        self.heads = heads.to(self.device)
        groups = build_param_groups(self.heads.named_modules(), depth, run.optimizer)
        self.head_optimizer = build_adamw(groups, run.optimizer)
        if training:
            self.heads_ddp = DistributedDataParallel(
                self.heads,
                device_ids=None if self.device.type == "cpu" else [self.device],
                find_unused_parameters=run.find_unused_parameters,
            )

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The heads' trainable parameters."""
        return [parameter for parameter in self.heads.parameters() if parameter.requires_grad]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both optimizers, as the optimizers hold them: set `lr` here."""
        groups = list(self.backbone.optimizer.param_groups[0][RATE_GROUPS]) if self.trainable_backbone else []
        return groups + list(self.head_optimizer.param_groups)

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """What the backbone's optimizer keeps from step to step on this rank, as far as it is there already."""
        if not self.trainable_backbone:
            return
        zero = self.backbone.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            kept = (flat, flat.grad, *zero.optimizer.state.get(flat, {}).values())
            yield from (value for value in kept if isinstance(value, torch.Tensor))
        yield zero.grad_partitions_flat_buffer

    @torch.no_grad()
    def load_masters(self, stretches: Iterable[Stretch]) -> None:
        """Give FP32 masters the values that the weights of the backbone were rounded from.

        Args:
            stretches: parts of trained parameters, the same on every rank.
        """
        parameters = dict(self.backbone.module.named_parameters())
        for name, start, values in stretches:
            first, stop = own_stretch(parameters[name])
            begin, end = max(first, start), min(stop, start + values.numel())
            if begin < end:
                master = local_master(parameters[name])
                master[begin - first : end - first].copy_(values[begin - start : end - start])

    def train(self, mode: bool = True) -> None:
        """Put both parts into training or evaluation mode."""
        self.backbone.train(mode)
        self.heads.train(mode)

    def encode_decode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Class scores of a batch of crops; a collective over all ranks, without gradient.

        Args:
            images_B3HW: normalised images, any float dtype; sides are multiples of the patch.

        Returns:
            logits_BKHW, FP32, at the resolution of the images.
        """
        with torch.no_grad():
            features = self.backbone(images_B3HW.to(self.device, self.dtype))
            return self.heads.predict(features, images_B3HW.shape[2:])


def own_stretch(parameter: nn.Parameter) -> tuple[int, int]:
    """First element and one past the last of this rank's part of a flat ZeRO-3 parameter, without the padding."""
    numel, part = parameter.ds_numel, parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = min(distributed.rank() * part, numel)
    return start, min(start + part, numel)


def build_modules(run: RunConfig) -> tuple[nn.Module, SegmentationHeads]:
    """The backbone, sharded from its first parameter on, and the heads, from the run's seed.

    Raises:
        ConfigError: an argument that the backbone or a head does not take, or channels that don't fit.
    """
    torch.manual_seed(run.seed)
    with deepspeed.zero.Init(config_dict_or_path=run.deepspeed):
        backbone = build_backbone(run.model)
    validate_head_channels(run.model, backbone.out_channels)
    torch.manual_seed(run.seed)
    return backbone, build_heads(run.model)


def _wrap_backbone(backbone: nn.Module, depth: int, run: RunConfig, *, optimize: bool) -> deepspeed.DeepSpeedEngine:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # one gather and one pair of hooks a block instead of one for each layer in it: a quarter of a small model's step
    set_z3_leaf_modules(backbone, [Block])
    if run.compile:
        compile_blocks(backbone)
    optimizer = None
    if optimize:
        groups = build_param_groups(backbone.named_modules(prefix="backbone"), depth, run.optimizer)
        optimizer = build_backbone_adamw(groups, run.optimizer, offloaded=offloaded_share(run.deepspeed) > 0)
    _import_muon_as_it_is()
    config = suit_device(run.deepspeed, distributed.device().type)
    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=config, dist_init_required=False)
    if optimizer is not None:
        partly = 0 < offloaded_share(run.deepspeed) < 1
        use_joint_norm(engine, build_resident_adamw(optimizer, groups, run.optimizer) if partly else None)
    return engine


def _import_muon_as_it_is() -> None:
    """Keep DeepSpeed from loading torch's compiler for an optimizer that nothing here uses.

    ZeRO-3 imports Muon, which has three functions compiled as it is imported (DeepSpeed 0.19.8): 1 s of a start.
    """
    compile_functions, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_functions
