"""`--cfg-options key=value ...`, with the value syntax that MMSeg's users know."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.errors import ConfigError

from mmcv import DictAction  # isort: skip

_DICT = re.compile(r"^[\s\[('\"]*(dict\(|{)|,\s*(dict\(|{)")


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `a.b=1 c=[1,2] d="(3,4)"` as mmcv does.

    Raises:
        ConfigError: a part is not of the form key=value, or its value is one that mmcv can't parse.
    """
    malformed = [pair for pair in pairs if "=" not in pair or pair.startswith("=")]
    if malformed:
        raise ConfigError(f"--cfg-options {malformed[0]}: want key=value, such as optimizer.lr=1e-4.")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    overrides: dict[str, Any] = {}
    for pair in pairs:
        if _DICT.search(pair.partition("=")[2]):
            raise ConfigError(
                f"--cfg-options {pair}: a value can't be a dict. Set its keys one by one, such as "
                "model.decode_head.loss_decode.type=DiceLoss, or write it into the config file."
            )
        try:
            overrides |= parser.parse_args(["--cfg-options", pair]).cfg_options
        except (AssertionError, RecursionError) as error:
            raise ConfigError(
                f"--cfg-options {pair}: its brackets don't match. Lists are [1,2] or 1,2, tuples (1,2), in quotes that "
                "keep the shell from reading them."
            ) from error
    return overrides
