"""Small segmentation models with random weights, exported without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_seg.checkpoint.description import ModelDescription
from ds_seg.checkpoint.export import write_export
from ds_seg.checkpoint.model_weights import ModelWeights, open_modules
from ds_seg.models import build_heads
from ds_seg.models.backbone_building import build_backbone

CLASSES = ("sky", "road", "tree")
PALETTE = ((0, 0, 255), (90, 90, 90), (0, 200, 0))
BACKBONE = {"type": "InternViT", "embed_dim": 16, "num_heads": 2, "depth": 4, "patch_size": 4, "img_size": 16}
BACKBONE |= {"out_indices": [0, 1, 2, 3]}
HEAD = {"type": "FCNHead", "in_channels": 16, "channels": 16, "num_convs": 0, "num_classes": 3, "with_norm": True}
HEAD |= {"in_index": 3, "concat_input": False}
AUXILIARY = {**HEAD, "in_index": 1, "num_convs": 1, "channels": 8, "with_norm": False}
UPER = {"type": "UPerHead", "in_channels": [16] * 4, "in_index": [0, 1, 2, 3], "channels": 8, "num_classes": 3}
OCR = {"type": "OCRHead", "in_channels": 16, "in_index": 3, "channels": 16, "ocr_channels": 8, "num_classes": 3}
UPER |= {"norm_cfg": {"type": "SyncBN"}}
OCR |= {"norm_cfg": {"type": "SyncBN"}}
SLIDE = {"mode": "slide", "crop_size": (24, 24), "stride": (16, 16)}
PIPELINE: list[dict[str, Any]] = [
    {"type": "LoadImageFromFile"},
    {
        "type": "MultiScaleFlipAug",
        "img_scale": (48, 40),
        "flip": False,
        "transforms": [
            {"type": "Resize", "keep_ratio": False},
            {"type": "RandomFlip"},
            {"type": "Normalize", "mean": [120.0, 110.0, 100.0], "std": [58.0, 57.0, 56.0], "to_rgb": True},
            {"type": "ImageToTensor", "keys": ["img"]},
            {"type": "Collect", "keys": ["img"]},
        ],
    },
]
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"backbone": BACKBONE, "decode_head": HEAD},
    "one_auxiliary_head": {"backbone": BACKBONE, "decode_head": HEAD, "auxiliary_head": AUXILIARY},
    "listed_auxiliary_heads": {"backbone": BACKBONE, "decode_head": HEAD, "auxiliary_head": [AUXILIARY]},
    "upernet": {"backbone": {**BACKBONE, "with_fpn": True, "with_final_norm": True}, "decode_head": UPER},
    "cascade": {"backbone": BACKBONE, "decode_head": [AUXILIARY, OCR]},
    "one_channel": {"backbone": {**BACKBONE, "in_chans": 1}, "decode_head": HEAD},
    "like_dinov2": {
        "backbone": {**BACKBONE, "norm": "layer", "qkv_bias": True, "qk_normalization": False, "output_norm": True},
        "decode_head": HEAD,
    },
}


def describe(name: str = "linear", dtype: torch.dtype = torch.float32, **test_cfg: Any) -> ModelDescription:
    """A model of MODELS, with its test_cfg (sliding windows if none is given)."""
    kind = {"type": "EncoderDecoder"}
    if name == "cascade":
        kind = {"type": "CascadeEncoderDecoder", "num_stages": 2}
    model = {**kind, **MODELS[name], "test_cfg": test_cfg or SLIDE}
    return ModelDescription(CLASSES, PALETTE, model, PIPELINE, dtype, window_batch=2)


def build(description: ModelDescription, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Backbone and heads with random values everywhere, running statistics included."""
    torch.manual_seed(seed)
    modules = build_backbone(description.model), build_heads(description.model)
    for module in modules:
        for name, tensor in module.state_dict().items():
            value = torch.randn(tensor.shape) * 0.3 if tensor.is_floating_point() else torch.tensor(7)
            tensor.copy_(value.abs() + 0.1 if name.endswith("running_var") else value)
    return modules


def export(
    path: Path, description: ModelDescription, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ModelWeights:
    """Write a model with random weights, in the format that the suffix tells; returns the weights."""
    weights = open_modules(*build(description, seed))
    file_format = "safetensors" if path.suffix == ".safetensors" else "mmseg"
    with write_export(path, file_format, weights, description, dtype):
        pass
    return weights
