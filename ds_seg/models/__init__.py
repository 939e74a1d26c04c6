"""Backbone, heads, norm and weights. Importing this package registers them with MMCV and MMSegmentation."""

from ds_seg.models.fcn_head import FCNHead
from ds_seg.models.head_channels import validate_head_channels
from ds_seg.models.heads import SegmentationHeads, build_heads
from ds_seg.models.internvit import InternViT
from ds_seg.models.load_weights import load_backbone_weights
from ds_seg.models.probe import probe_heads
from ds_seg.models.sync_batchnorm import SyncBatchNorm
from ds_seg.models.weight_report import WeightReport

__all__ = [
    "FCNHead",
    "InternViT",
    "SegmentationHeads",
    "SyncBatchNorm",
    "WeightReport",
    "build_heads",
    "load_backbone_weights",
    "probe_heads",
    "validate_head_channels",
]
