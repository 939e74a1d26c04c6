"""The config as a run records it, and what has changed in it since a checkpoint was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

from ds_seg.checkpoint.manifest import read_manifest
from ds_seg.config import RunConfig, read_config_file
from ds_seg.config.files import KNOWN_KEYS
from ds_seg.errors import ConfigError

CONFIG_FILE = "config.py"
"""In the work dir: the config of the last run there."""
_ONLY_AT_THE_START = ("load_from", "resume_from", "auto_resume")
"""Keys that a resumed run does not read, or that tell it to resume."""
_NAMED_AT_MOST = 8
_LONGEST_VALUE = 40
_LINE_LENGTH = 120


def record_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a config: the keys that mean something, without the variables that it uses on the way."""
    return {key: value for key, value in config.items() if key in KNOWN_KEYS}


def format_config(config: Mapping[str, Any]) -> str:
    """The text of a config file from which these values are read again.

    MMCV's `pretty_text` fails on an apostrophe in a string, and loses backslashes.
    """
    return "".join(f"{key} = {pformat(value, width=_LINE_LENGTH, sort_dicts=False)}\n" for key, value in config.items())


def digest_config(config: Mapping[str, Any]) -> str:
    """SHA-256 of what makes a difference to a run that goes on."""
    return hashlib.sha256(_to_json(_without_start(config)).encode()).hexdigest()


def describe_changes(checkpoint: Path, run: RunConfig) -> str | None:
    """What a resumed run's config says otherwise than that of the run that saved, in a line; None for nothing.

    Args:
        checkpoint: in the work dir of that run, or in what it was moved to.
        run: the run of today, whose own config was not written yet.
    """
    saved_digest = read_manifest(checkpoint).config_digest
    if saved_digest == digest_config(run.mmseg):
        return None
    line = f"the config is not the one that {checkpoint.name} was saved with"
    path = checkpoint.parents[1] / CONFIG_FILE
    try:
        saved = read_config_file(path, {})
    except ConfigError:
        return f"{line}; {path} can't be read, so what has changed is not known"
    if digest_config(saved) != saved_digest:
        return f"{line}; {path} is of another run, so what has changed is not known"
    then, now = (dict(_flatten(_without_start(config))) for config in (saved, run.mmseg))
    changes = [
        f"{key} {_shorten(then.get(key))} -> {_shorten(now.get(key))}"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    more = f", and {len(changes) - _NAMED_AT_MOST} more" if len(changes) > _NAMED_AT_MOST else ""
    return f"{line}: {', '.join(changes[:_NAMED_AT_MOST])}{more}. The run uses the new values"


def _without_start(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record_config(config).items() if key not in _ONLY_AT_THE_START}


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key -> value as JSON, down to what is no dict and no list of dicts."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{key}[{index}]")
    else:
        yield key, _to_json(value)


def _to_json(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def _shorten(value: str | None) -> str:
    if value is None:
        return "(none)"
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 3]}..."
