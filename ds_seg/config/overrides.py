"""`--cfg-options key=value ...`, with the value syntax that MMSeg's users know."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.errors import ConfigError

from mmcv import DictAction  # isort: skip


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `a.b=1 c=[1,2] d="(3,4)"` as mmcv does.

    Raises:
        ConfigError: a part is not of the form key=value.
    """
    malformed = [pair for pair in pairs if "=" not in pair or pair.startswith("=")]
    if malformed:
        raise ConfigError(f"--cfg-options {malformed[0]}: want key=value, such as optimizer.lr=1e-4.")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    return parser.parse_args(["--cfg-options", *pairs]).cfg_options if pairs else {}
