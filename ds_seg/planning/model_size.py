"""How many parameters the modules of a model config have, counted on modules without values."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_seg.errors import ConfigError
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.head_channels import validate_head_channels
from ds_seg.models.heads import SegmentationHeads, build_heads


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters."""

    backbone: int
    trainable: int
    """Of the backbone."""
    used_again: int
    """Of the backbone, in the backward pass."""
    block: int
    """Of one transformer block."""
    largest: int
    """Of the backbone's largest single parameter."""
    depth: int
    """Blocks, also those behind the last tap."""
    head: int
    """Of all heads."""
    head_trainable: int
    head_buffers: int
    """Elements of running statistics."""
    parts: tuple[int, ...] = ()
    """Of each of the backbone's parameters."""


def measure_model(model_cfg: Mapping[str, Any]) -> ModelSize:
    """Count the parameters of the real modules.

    Raises:
        ConfigError: the backbone or a head can't be built, or their channels don't fit.
    """
    backbone, heads = build_on_meta(model_cfg)
    parameters = list(backbone.parameters())
    everything, trainable = (sum(p.numel() for p in parameters if p.requires_grad or whole) for whole in (True, False))
    return ModelSize(
        backbone=everything,
        trainable=trainable,
        used_again=everything if backbone.is_trunk_trainable() else trainable,
        block=sum(p.numel() for p in backbone.blocks[0].parameters()),
        largest=max(p.numel() for p in parameters),
        depth=len(backbone.blocks),
        head=sum(p.numel() for p in heads.parameters()),
        head_trainable=sum(p.numel() for p in heads.parameters() if p.requires_grad),
        head_buffers=sum(buffer.numel() for buffer in heads.buffers()),
        parts=tuple(p.numel() for p in parameters),
    )


def build_on_meta(model_cfg: Mapping[str, Any]) -> tuple[nn.Module, SegmentationHeads]:
    """Backbone and heads as shapes without values, in FP32.

    Raises:
        ConfigError: one of them can't be built, or their channels don't fit.
    """
    with torch.device("meta"):
        backbone = build_backbone(model_cfg)
        validate_head_channels(model_cfg, backbone.out_channels)
        with contextlib.suppress(ConfigError):
            return backbone, build_heads(model_cfg, initialise=False)
    return backbone, build_heads(model_cfg, initialise=False).to("meta")  # one that reads values, as Segmenter's does
