"""One MMSegmentation head from its config: built, initialised, and normalising over all ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import ds_seg.models.focal_loss  # before a loss is built
import ds_seg.models.pixel_accuracy  # before a head is built
import ds_seg.models.unlabelled  # before a loss is built
import ds_seg.openmmlab  # noqa: F401  (before mmseg)
from ds_seg.config.build_errors import describe_build_error
from ds_seg.errors import ConfigError
from ds_seg.models.imagewise_losses import compute_losses_by_image
from ds_seg.models.sync_batchnorm import SyncBatchNorm
from ds_seg.openmmlab import MissingOperatorError

from mmseg.models.builder import build_head  # isort: skip
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead  # isort: skip

_UNFIT = {"DPTHead": "it reads pairs of a map and a class token, and the backbone puts out maps alone"}


def build_one_head(field: str, cfg: Mapping[str, Any], *, after_another: bool, initialise: bool = True) -> nn.Module:
    """Build and initialise one head.

    Every BatchNorm in it becomes SyncBatchNorm: statistics of one rank alone would make the replicas differ and the
    result depend on how a batch is spread over ranks.

    Args:
        field: where the head stands, for messages.
        cfg: its config; not changed.
        after_another: whether it gets another head's output, as the later ones of a cascade do.
        initialise: draw initial values, which mmcv looks at, so that it can't on the meta device.

    Raises:
        ConfigError: the head can't be built, or can't stand there.
    """
    head_type = cfg.get("type") if isinstance(cfg, Mapping) else None
    if head_type in _UNFIT:
        raise ConfigError(f"{field}.type is {head_type}, which can't work here: {_UNFIT[head_type]}. Choose another.")
    try:
        head = build_head(copy.deepcopy(cfg))  # some heads take keys out of nested dicts
    except MissingOperatorError as error:
        raise ConfigError(f"{field}: {error}") from error
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{field} can't be built: {describe_build_error(error, field, cfg)}. Correct it in the model config."
        ) from error
    if isinstance(head, BaseCascadeDecodeHead) != after_another:
        place = "follow another head" if after_another else "stand first or alone"
        raise ConfigError(
            f"{field} is {head_type}, which can't {place}. A cascade is model.type='CascadeEncoderDecoder' with "
            "decode_head=[a head such as FCNHead, then OCRHead or PointHead] and num_stages=2."
        )
    if initialise:
        _initialise(head)
    synchronise_norms(head)
    compute_losses_by_image(head)
    return head


def synchronise_norms(module: nn.Module) -> None:
    """Put SyncBatchNorm in the place of every BatchNorm below `module`, with the same parameters and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(module, name, norm)
        else:
            synchronise_norms(child)


def _initialise(head: nn.Module) -> None:
    # mmcv prints every initialised parameter through its logger unless that writes to a file
    logger = logging.getLogger("mmcv")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        head.init_weights()  # type: ignore[operator]
    finally:
        logger.setLevel(level)
