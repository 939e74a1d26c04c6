"""The backbone of an MMSegmentation model config, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import ds_seg.models.internvit
import ds_seg.openmmlab  # noqa: F401  (before mmseg)
from ds_seg.config.build_errors import describe_build_error, find_origin
from ds_seg.errors import ConfigError

from mmseg.models.builder import build_backbone as build_mmseg_backbone  # isort: skip


def build_backbone(model_cfg: Mapping[str, Any]) -> nn.Module:
    """Build the backbone with its initial values, wherever the caller's context wants parameters to be made.

    Args:
        model_cfg: the `model` dict; `pretrained` in its backbone is not read.

    Raises:
        ConfigError: an argument that the backbone does not take, or one that can't be.
    """
    section = {**model_cfg["backbone"], "pretrained": None}
    try:
        return build_mmseg_backbone(section)
    except ConfigError as error:
        raise ConfigError(str(find_origin(error))) from error
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        fault = describe_build_error(error, "model.backbone", section)
        raise ConfigError(f"model.backbone can't be built: {fault}. Correct it in the config.") from error
