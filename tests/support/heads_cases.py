"""The heads and losses that heads_worker.py trains for two steps each, on maps of a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.config.head_fields import predicting_head
from ds_seg.data.training_batches import MicroBatch

CLASSES, IGNORED, WIDTH, PATCH, WORLD = 5, 255, 16, 4, 2
SIDE_PX, MICRO_BATCH = 32, 2
ONE_MAP, FOUR_TAPS, FOUR_SCALES = "one map", "four taps", "four scales"
"""What a case's backbone puts out: of one block, of four blocks, of four blocks with `with_fpn`."""
ROOT = Path(__file__).resolve().parents[2]
CE = {"type": "CrossEntropyLoss"}
_ONE = {"in_channels": WIDTH, "channels": 8, "num_classes": CLASSES, "norm_cfg": {"type": "SyncBN"}, "loss_decode": CE}
_FOUR = {**_ONE, "in_channels": [WIDTH] * 4, "in_index": [0, 1, 2, 3]}
_FCN = {**_ONE, "type": "FCNHead"}
_LINEAR = {**_FCN, "num_convs": 0, "channels": WIDTH, "norm_cfg": None}
_TRANSFORMER = {"channels": WIDTH, "num_layers": 2, "num_heads": 2, "embed_dims": 8, "norm_cfg": {"type": "LN"}}
_KERNEL_UPDATOR = {"in_channels": 8, "feat_channels": 8, "out_channels": 8, "act_cfg": {"type": "ReLU"}}
_KERNEL_UPDATE = {
    "type": "KernelUpdateHead",
    "num_classes": CLASSES,
    "num_heads": 2,
    "num_mask_fcs": 1,
    "feedforward_channels": 16,
    "in_channels": 8,
    "out_channels": 8,
    "feat_transform_cfg": {"conv_cfg": {"type": "Conv2d"}, "act_cfg": None},
    "kernel_updator_cfg": {"type": "KernelUpdator", **_KERNEL_UPDATOR, "norm_cfg": {"type": "LN"}},
}
_FPN = {**_FOUR, "type": "FPNHead", "feature_strides": [4, 8, 16, 32]}
_POINTS = {"type": "PointHead", "in_channels": [WIDTH], "in_index": [0], "norm_cfg": None, "num_fcs": 2}

PLAIN = {
    "ANNHead": {**_ONE, "in_channels": [WIDTH] * 2, "in_index": [1, 2], "project_channels": 8},
    "APCHead": _ONE,
    "ASPPHead": {**_ONE, "dilations": (1, 2, 3)},
    "CCHead": _ONE,
    "DAHead": {**_ONE, "pam_channels": 4},
    "DMHead": _ONE,
    "DNLHead": _ONE,
    "DepthwiseSeparableASPPHead": {**_ONE, "dilations": (1, 2, 3), "c1_in_channels": WIDTH, "c1_channels": 4},
    "DepthwiseSeparableFCNHead": _ONE,
    "EMAHead": {**_ONE, "ema_channels": 8, "num_bases": 4, "num_stages": 2},
    "EncHead": {**_ONE, "in_channels": [WIDTH] * 3, "in_index": [1, 2, 3], "num_codes": 4, "norm_cfg": {"type": "BN"}},
    "FCNHead": _FCN,
    "FPNHead": _FPN,
    "GCHead": _ONE,
    "ISAHead": {**_ONE, "isa_channels": 4, "down_factor": (4, 4)},
    "NLHead": _ONE,
    "PSPHead": _ONE,
    "SETRUPHead": {**_ONE, "num_convs": 2, "up_scale": 2},
    "STDCHead": {**_ONE, "num_classes": 2},
    "SegformerHead": _FOUR,
    "SegmenterMaskTransformerHead": {**_ONE, **_TRANSFORMER},
    "UPerHead": _FOUR,
}
"""Heads that stand alone, by type."""
_ON_SCALES = ("ANNHead", "DepthwiseSeparableASPPHead", "EncHead", "FPNHead", "SegformerHead")

CASES: dict[str, dict] = {
    **{name: {"decode_head": {"type": name, **head}} for name, head in PLAIN.items()},
    **{name: {"decode_head": {"type": name, **PLAIN[name]}, "maps": FOUR_SCALES} for name in _ON_SCALES},
    "STDCHead": {
        "decode_head": _FCN,
        "auxiliary_head": {**PLAIN["STDCHead"], "type": "STDCHead", "in_index": 0},
        "maps": FOUR_SCALES,
    },
    "UPerHead": {
        "decode_head": {**_FOUR, "type": "UPerHead"},
        "auxiliary_head": {**_FCN, "num_convs": 1, "in_index": 2},
        "maps": FOUR_SCALES,
    },
    "linear": {"decode_head": {**_LINEAR, "with_norm": True}},
    "LRASPPHead": {
        "decode_head": {
            **_ONE,
            "type": "LRASPPHead",
            "in_channels": [WIDTH] * 3,
            "in_index": [2, 1, 0],
            "input_transform": "multiple_select",
            "branch_channels": (8, 8),
        },
        "side_px": 13 * PATCH,  # its pooling wants a last map of 49 positions a side
        "maps": FOUR_SCALES,
    },
    "SETRMLAHead": {
        "decode_head": {**_FOUR, "type": "SETRMLAHead", "channels": 16, "mla_channels": 4, "up_scale": 2},
        "maps": FOUR_TAPS,
    },
    "IterativeDecodeHead": {
        "decode_head": {
            "type": "IterativeDecodeHead",
            "num_stages": 2,
            "kernel_generate_head": _FCN,
            "kernel_update_head": [_KERNEL_UPDATE] * 2,
        }
    },
    "OCRHead": {"decode_head": [_FCN, {**_FCN, "type": "OCRHead", "ocr_channels": 4}]},
    "PointHead": {
        "decode_head": [_FPN, {**_ONE, **_POINTS}],
        "train_cfg": {"num_points": 32, "oversample_ratio": 3, "importance_sample_ratio": 0.75},
        "test_cfg": {"subdivision_steps": 1, "subdivision_num_points": 64, "scale_factor": 2},
        "maps": FOUR_SCALES,
    },
    "HeadWithSpareLayer": {"decode_head": {**_FCN, "type": "HeadWithSpareLayer"}},
}
"""The model sections to train, by the head that they are about."""

WEIGHTS = [1.0, 2.0, 0.5, 1.0, 1.5]
LOSSES: dict[str, dict] = {
    "ce": {"loss_decode": CE},
    "ce_weighted": {"loss_decode": {**CE, "class_weight": WEIGHTS}},
    "ce_avg_non_ignore": {"loss_decode": {**CE, "class_weight": WEIGHTS, "avg_non_ignore": True}},
    "ce_elementwise": {"loss_decode": {**CE, "reduction": "none"}},
    "bce": {"loss_decode": {**CE, "use_sigmoid": True, "avg_non_ignore": True}},
    "bce_one_channel": {
        "num_classes": 2,
        "out_channels": 1,
        "threshold": 0.4,
        "loss_decode": {**CE, "use_sigmoid": True},
    },
    "dice": {"loss_decode": {"type": "DiceLoss", "class_weight": WEIGHTS}},
    "lovasz": {"loss_decode": {"type": "LovaszLoss", "reduction": "none"}},
    "lovasz_per_image": {"loss_decode": {"type": "LovaszLoss", "per_image": True}},
    "tversky": {"loss_decode": {"type": "TverskyLoss"}},
    "focal": {"loss_decode": {"type": "FocalLoss"}},
    "ohem_threshold": {"loss_decode": CE, "sampler": {"type": "OHEMPixelSampler", "thresh": 0.3, "min_kept": 100}},
    "ohem_largest": {"loss_decode": CE, "sampler": {"type": "OHEMPixelSampler", "min_kept": 100}},
    "list": {
        "loss_decode": [
            CE,
            {"type": "DiceLoss", "loss_weight": 3.0},
            {"type": "TverskyLoss", "loss_name": "loss_first"},
            {"type": "FocalLoss", "loss_name": "loss_first"},
            {"type": "LovaszLoss", "reduction": "none", "loss_name": "lovasz_only_logged"},
        ]
    },
}
"""What differs from the linear head of `loss_case`."""


def loss_case(name: str) -> dict:
    """The linear head on one loss, in steps of two micro-batches."""
    return {"decode_head": {**_LINEAR, "dropout_ratio": 0.0, **LOSSES[name]}, "accumulation": 2}


def make_run(case: dict) -> RunConfig:
    """The demo's recipe on a tiny backbone; a step is 2 ranks x `accumulation` micro-batches x 2 crops."""
    side_px, maps = case.get("side_px", SIDE_PX), case.get("maps", ONE_MAP)
    cascade = isinstance(case["decode_head"], list)
    depth = 1 if maps == ONE_MAP else 4
    backbone = {"embed_dim": WIDTH, "depth": depth, "num_heads": 2, "patch_size": PATCH, "img_size": SIDE_PX}
    options = {
        "model.type": "CascadeEncoderDecoder" if cascade else "EncoderDecoder",
        "model.backbone": backbone | {"out_indices": list(range(depth)), "with_fpn": maps == FOUR_SCALES},
        "model.decode_head": case["decode_head"] if cascade else {"_delete_": True, **case["decode_head"]},
        "model.test_cfg": case.get("test_cfg", {}),
        "data.samples_per_gpu": MICRO_BATCH,
        "data.train.pipeline.3.crop_size": (side_px, side_px),
        "data.train.pipeline.6.size": (side_px, side_px),
        "global_batch": MICRO_BATCH * case.get("accumulation", 1) * WORLD,
        "optimizer.lr": 1e-2,
        "lr_config.warmup_iters": 0,
    }
    options |= {"model.num_stages": 2} if cascade else {}
    options |= {f"model.{key}": case[key] for key in ("auxiliary_head", "train_cfg") if key in case}
    deepspeed_json = str(ROOT / "ds_configs/deepspeed/zero3_bf16.json")
    return build_run_config(RunOptions("demo", deepspeed_config=deepspeed_json, cfg_options=options), WORLD)


def make_batches(run: RunConfig, rank: int, *, seed: int = 0, all_ignored_on: int | None = None) -> list[MicroBatch]:
    """A rank's random micro-batches of a global batch, with unequal shares of ignored pixels."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    side_px, classes = run.train_crop_px[0], int(predicting_head(run.model)[1]["num_classes"])
    batches = []
    for index in range(run.accumulation_steps):
        images_B3HW = torch.randn(MICRO_BATCH, 3, side_px, side_px, generator=generator)
        coarse_B1hw = torch.randint(classes, (MICRO_BATCH, 1, side_px // PATCH, side_px // PATCH), generator=generator)
        labels_B1HW = coarse_B1hw.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        labels_B1HW[:, :, : 4 + 3 * rank + 5 * index] = IGNORED
        if rank == all_ignored_on:
            labels_B1HW[:] = IGNORED
        batches.append(MicroBatch(images_B3HW, labels_B1HW, list(range(MICRO_BATCH)), [{}] * MICRO_BATCH))
    return batches
