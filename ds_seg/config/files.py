"""Find and read an MMSeg config file, apply overrides, and name what nothing will read."""

from __future__ import annotations

import ast
import contextlib
import tokenize
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.faults import Faults, suggest
from ds_seg.errors import ConfigError

from mmcv import Config  # isort: skip

CONFIGS_ROOT = Path(__file__).resolve().parents[2] / "ds_configs"
RUNS_FOLDER = CONFIGS_ROOT / "runs"

KNOWN_KEYS = frozenset(
    """
    model data optimizer optimizer_config lr_config runner checkpoint_config evaluation log_config load_from
    seed work_dir deepspeed_config global_batch max_skipped_steps on_divergence max_rollbacks check_data
    find_unused_parameters compile custom_imports data_root dataset_type deepspeed pretrained fp16 dist_params log_level
    resume_from workflow cudnn_benchmark opencv_num_threads mp_start_method device gpu_ids auto_resume custom_hooks
    """.split()
)


# Names that MMSeg's own configs give to values they use further down; a dumped config keeps them.
_USUAL_VARIABLES = frozenset(
    """
    img_norm_cfg img_scale crop_size train_pipeline val_pipeline test_pipeline norm_cfg backbone_norm_cfg num_classes
    checkpoint
    """.split()
)


def resolve_config_path(name: str) -> Path:
    """The file that CONFIG names: a path, or the bare name of a file in `ds_configs/runs`.

    Raises:
        ConfigError: there is no such file; the message lists the runs.
    """
    for candidate in (Path(name), RUNS_FOLDER / f"{name}.py"):
        if candidate.is_file():
            return candidate.resolve()
    runs = sorted(path.stem for path in RUNS_FOLDER.glob("*.py"))
    raise ConfigError(
        f"CONFIG '{name}' is neither a file nor the name of a run.{suggest(name, runs)}\n"
        f"Runs that ship with ds_seg: {', '.join(runs)}."
    )


def read_config_file(path: Path, overrides: Mapping[str, Any]) -> Config:
    """Read an MMSeg 0.x config with its bases and apply `--cfg-options`.

    Args:
        path: the `.py` file.
        overrides: dotted key -> value, as mmcv's DictAction parses them.

    Raises:
        ConfigError: the file can't be read, an override doesn't fit, or a key is unknown.
    """
    _validate_syntax(path)
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is Python code: it can raise anything
        raise ConfigError(f"{_failing_line(path, error)} can't be read: {type(error).__name__}: {error}") from error
    faults = Faults(str(path))
    _check_top_level_keys(config, path, faults)
    for key in overrides:
        first = key.partition(".")[0]
        if first not in KNOWN_KEYS and first not in config:
            faults.add(f"--cfg-options {key}", f"no config key is called '{first}'.{suggest(first, KNOWN_KEYS)}")
    faults.raise_if_any()
    try:
        config.merge_from_dict(dict(overrides))
    except (KeyError, TypeError, ValueError, AssertionError, IndexError, AttributeError) as error:
        raise ConfigError(f"--cfg-options {' '.join(overrides)} don't fit {path}: {error}") from error
    return config


def _validate_syntax(path: Path) -> None:
    """Refuse a file, or one of its bases, that is no Python, as one that was written half is not."""
    files = []
    try:
        # a missing base, bytes that are no text: MMCV's own message says it
        with contextlib.suppress(OSError, ValueError):
            files = _config_files(path)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ConfigError(
            f"{error.filename or path} line {error.lineno} is no Python: {error.msg}{f' ({line})' if line else ''}. If "
            "the file was cut off while it was written or copied, write it anew; else correct the line."
        ) from error
    empty = [str(file) for file in files if not file.read_text(encoding="utf-8").strip()]
    if empty:
        raise ConfigError(f"{', '.join(empty)}: the file is empty. Write it anew.")


def _failing_line(path: Path, error: Exception) -> str:
    """The file and line of a config, or of one of its bases, that raised an error, as far as that can be told.

    MMCV 1.7 runs a copy of each file, so the traceback has the line but not the file.
    """
    file, line = str(path), ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_file2dict":
            file, line = str(frame.f_locals.get("filename", file)), ""
        elif frame.f_code.co_name == "<module>":
            line = f" line {number}"
    return f"{file}{line}"


def _check_top_level_keys(config: Config, path: Path, faults: Faults) -> None:
    """A name that is neither known nor read by the config's own code does nothing: most likely a typo."""
    helpers = set(_USUAL_VARIABLES)
    for source in _config_files(path):
        helpers |= _names_read(source)
    for key in config:
        if key not in KNOWN_KEYS and key not in helpers:
            faults.add(
                key, f"unknown key, and the config does not use it as a variable either.{suggest(key, KNOWN_KEYS)}"
            )


def _config_files(path: Path) -> list[Path]:
    files = [path]
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_base_" for t in node.targets):
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                files += _config_files((path.parent / base).resolve())
    return files


def _names_read(path: Path) -> set[str]:
    tree = _parse(path)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imported = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    names.update(alias.asname or alias.name for node in imported for alias in node.names)
    return names | set(_base_references(path))


def _base_references(path: Path) -> list[str]:
    """Names that the file takes from its bases as `{{_base_.name}}`."""
    text = path.read_text(encoding="utf-8")
    return [part.partition("}}")[0].strip().split(".")[0] for part in text.split("_base_.")[1:]]


def _parse(path: Path) -> ast.Module:
    with tokenize.open(path) as file:
        source = file.read().replace("{{", "((").replace("}}", "))")
    return ast.parse(source, filename=str(path))
