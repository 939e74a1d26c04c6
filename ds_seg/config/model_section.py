"""The `model` section: what has to be right before a backbone or a head is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.faults import Faults, list_fields, suggest
from ds_seg.config.head_fields import auxiliary_head_fields, classifying_head, decode_head_fields

from mmcv.cnn.bricks.registry import NORM_LAYERS  # isort: skip

_BACKBONE_FLAGS = (
    "qkv_bias",
    "qk_normalization",
    "freeze_vit",
    "unfreeze_pos_embed",
    "with_fpn",
    "with_final_norm",
    "output_norm",
)


def validate_model(model: Mapping[str, Any], faults: Faults) -> None:
    """Check the `model` section, but for what the constructors of backbone and heads check themselves.

    Raises:
        ConfigError: backbone or heads are not such that anything else could be checked.
    """
    known = (
        *("type", "pretrained", "backbone", "neck", "decode_head", "auxiliary_head"),
        *("train_cfg", "test_cfg", "init_cfg"),
    )
    cascade = model.get("type") == "CascadeEncoderDecoder"
    faults.section("model", model, (*known, "num_stages") if cascade else known)
    if model.get("type") not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        faults.add("model.type", f"got {model.get('type')!r}, want 'EncoderDecoder' or 'CascadeEncoderDecoder'.")
    if not isinstance(model.get("backbone"), Mapping):
        faults.add("model.backbone", "missing.")
    else:
        _check_backbone(model["backbone"], faults)
        _refuse_init_cfg("model", model, faults)
        _refuse_init_cfg("model.backbone", model["backbone"], faults)
    if model.get("neck"):
        faults.add(
            "model.neck",
            "the heads read the backbone's own maps. Write neck=None, and model.backbone.with_fpn=True with four "
            "out_indices where a head wants maps of several scales.",
        )
    faults.section("model.train_cfg", model.get("train_cfg"), None)
    _check_heads(model, cascade, faults)
    faults.raise_if_any()
    refinement = ("subdivision_steps", "subdivision_num_points", "scale_factor") if cascade else ()
    test_cfg = faults.section("model.test_cfg", model.get("test_cfg"), ("mode", "crop_size", "stride", *refinement))
    if test_cfg.get("mode") not in ("slide", "whole"):
        faults.add("model.test_cfg.mode", f"got {test_cfg.get('mode')!r}, want 'slide' or 'whole'.")
    if test_cfg.get("mode") == "slide" and not {"crop_size", "stride"} <= set(test_cfg):
        faults.add("model.test_cfg", "mode='slide' needs crop_size=(height, width) and stride=(height, width).")
    elif test_cfg.get("mode") == "slide":
        patch_px = model["backbone"].get("patch_size", 14)
        faults.size_px("model.test_cfg.crop_size", test_cfg["crop_size"], multiple=patch_px)


def _check_backbone(backbone: Mapping[str, Any], faults: Faults) -> None:
    if backbone.get("type") not in ("InternViT", "InternViT6B"):
        faults.add(
            "model.backbone.type",
            f"got {backbone.get('type')!r}, want 'InternViT' or 'InternViT6B'. In the place of another one from "
            "_base_: backbone=dict(_delete_=True, type='InternViT', ...).",
        )
        return
    for name in ("patch_size", "img_size", "num_heads", "depth"):
        faults.integer(f"model.backbone.{name}", backbone, 1, minimum=1)
    width = faults.integer("model.backbone.embed_dim", backbone, 3200, minimum=1)
    faults.number("model.backbone.mlp_ratio", backbone, 4.0, minimum=1 / width)
    faults.number("model.backbone.drop_path_rate", backbone, 0.0, minimum=0.0)
    if backbone.get("init_values") is not None:
        faults.number("model.backbone.init_values", backbone, 0.0, minimum=0.0)
    taps = backbone.get("out_indices", ())
    if not isinstance(taps, (list, tuple)) or not all(isinstance(tap, int) for tap in taps):
        faults.add("model.backbone.out_indices", f"got {taps!r}, want a list of block numbers, such as [47].")
    for name in _BACKBONE_FLAGS:
        faults.flag(f"model.backbone.{name}", backbone, False)


def _refuse_init_cfg(field: str, section: Mapping[str, Any], faults: Faults) -> None:
    if section.get("init_cfg"):
        faults.add(
            f"{field}.init_cfg",
            f"got {section['init_cfg']!r}, which is not read. Remove it, and name the weights to start from in "
            "load_from (--load-from).",
        )


def _check_heads(model: Mapping[str, Any], cascade: bool, faults: Faults) -> None:
    decode_heads = decode_head_fields(model)
    if not decode_heads:
        faults.add("model.decode_head", "missing.")
    if cascade and not (isinstance(model.get("decode_head"), (list, tuple)) and len(decode_heads) > 1):
        faults.add("model.decode_head", "model.type='CascadeEncoderDecoder' needs a list of at least two heads.")
    if cascade and model.get("num_stages") != len(decode_heads):
        faults.add("model.num_stages", f"got {model.get('num_stages')!r}, but decode_head lists {len(decode_heads)}.")
    if not cascade and len(decode_heads) > 1:
        faults.add("model.decode_head", "several heads in a row need model.type='CascadeEncoderDecoder'.")
    for where, head in decode_heads + auxiliary_head_fields(model):
        if not isinstance(head, Mapping) or "type" not in head:
            faults.add(where, f"got {head!r}, want a dict with a type, such as dict(type='FCNHead', ...).")
            continue
        inner, classifier = classifying_head(where, head)
        _check_norm(f"{inner}.norm_cfg", classifier.get("norm_cfg"), faults)
        classes = faults.integer(f"{inner}.num_classes", classifier, 0, minimum=1)
        for place, loss in list_fields(f"{inner}.loss_decode", classifier.get("loss_decode")):
            _check_loss(place, loss, classifier.get("out_channels") or classes, faults)


def _check_norm(field: str, norm: Any, faults: Faults) -> None:
    """Also of a head that has no layer to normalise, such as a linear one."""
    name = faults.section(field, norm, None).get("type", "BN")
    if name not in NORM_LAYERS:
        known = NORM_LAYERS.module_dict
        faults.add(
            f"{field}.type", f"got {name!r}.{suggest(str(name), known)} MMCV's norms are {', '.join(sorted(known))}."
        )


def _check_loss(field: str, loss: Any, channels: int, faults: Faults) -> None:
    section = faults.section(field, loss, None)
    faults.number(f"{field}.loss_weight", section, 1.0, minimum=0.0)
    weights = section.get("class_weight")
    if not isinstance(weights, (list, tuple)):
        return
    if len(weights) != channels:
        faults.add(f"{field}.class_weight", f"has {len(weights)} numbers, but the head scores {channels} classes.")
    if not (all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) and any(weights)):
        faults.add(
            f"{field}.class_weight",
            f"got {weights!r}, want a finite number of at least 0 for each class, one of them above 0.",
        )
