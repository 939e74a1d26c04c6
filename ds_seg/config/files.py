"""Find and read an MMSeg config file, apply overrides, and name what nothing will read."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.faults import Faults, suggest
from ds_seg.errors import ConfigError

from mmcv import Config  # isort: skip
from mmcv.utils import import_modules_from_strings  # isort: skip

CONFIGS_ROOT = Path(__file__).resolve().parents[2] / "ds_configs"
RUNS_FOLDER = CONFIGS_ROOT / "runs"
_SUFFIXES = (".py", ".json", ".yaml", ".yml")

KNOWN_KEYS = frozenset(
    """
    model data optimizer optimizer_config lr_config runner checkpoint_config evaluation log_config load_from
    seed work_dir deepspeed_config global_batch max_skipped_steps on_divergence max_rollbacks check_data
    find_unused_parameters compile custom_imports data_root dataset_type deepspeed pretrained fp16 dist_params log_level
    resume_from workflow cudnn_benchmark opencv_num_threads mp_start_method device gpu_ids auto_resume custom_hooks
    """.split()
)

_CONSUMED = frozenset(("data_root", "dataset_type"))
"""Of the known keys, those that only the config's own code reads."""

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
        path: the file; a `.py`, or a `.json` or `.yaml` as MMCV reads them.
        overrides: dotted key -> value, as mmcv's DictAction parses them.

    Raises:
        ConfigError: the file can't be read, an override doesn't fit, or a key is unknown.
    """
    config, files = _read_with_bases(path)
    faults = Faults(str(path))
    _check_top_level_keys(config, files, faults)
    for key in overrides:
        first = key.partition(".")[0]
        if first not in KNOWN_KEYS and first not in config:
            faults.add(f"--cfg-options {key}", f"no config key is called '{first}'.{suggest(first, KNOWN_KEYS)}")
        elif first in _CONSUMED or first not in KNOWN_KEYS:
            faults.add(
                f"--cfg-options {key}",
                f"'{first}' is a variable, and the file has used it before options are read, so that nothing would "
                "change. Name what it went into, such as data.train.data_root.",
            )
    faults.raise_if_any()
    try:
        config.merge_from_dict(dict(overrides))
        if any(key.partition(".")[0] == "custom_imports" for key in overrides):
            import_modules_from_strings(**config.custom_imports)  # MMCV did so before there were overrides
    except ImportError as error:
        raise _explain_import("--cfg-options custom_imports", error) from error
    except (KeyError, TypeError, ValueError, AssertionError, IndexError, AttributeError) as error:
        raise ConfigError(f"--cfg-options {' '.join(overrides)} don't fit {path}: {error}") from error
    return config


def _read_with_bases(path: Path) -> tuple[Config, list[Path]]:
    """The config, and the files that it consists of: itself and its bases, however they are named.

    MMCV 1.7 reads each of them through one function, which is watched meanwhile.
    """
    read_file = Config._file2dict
    files: list[Path] = []
    being_read: list[Path] = []

    def read_sound_file(filename: str, *args: Any) -> Any:
        file = Path(filename).expanduser().resolve()
        if file in being_read:
            chain = " -> ".join(str(link) for link in [*being_read[being_read.index(file) :], file])
            raise ConfigError(f"_base_ leads back to the file that it stands in: {chain}. Remove it from one of them.")
        _validate_content(file)
        files.append(file)
        being_read.append(file)
        content = read_file(filename, *args)
        being_read.pop()
        return content

    Config._file2dict = staticmethod(read_sound_file)
    try:
        return Config.fromfile(str(path)), files
    except ConfigError:
        raise
    except ImportError as error:
        raise _explain_import(_failing_line(path, error), error) from error
    except Exception as error:  # a config is Python code: it can raise anything
        raise ConfigError(f"{_failing_line(path, error)} can't be read: {type(error).__name__}: {error}") from error
    finally:
        Config._file2dict = staticmethod(read_file)


def _explain_import(where: str, error: ImportError) -> ConfigError:
    cause = error if str(error) else error.__context__  # MMCV raises one without a text for custom_imports
    return ConfigError(
        f"{where} can't be read: {cause}. If that is a module of yours, put its folder on PYTHONPATH: PYTHONPATH=. for "
        "the current one."
    )


def _validate_content(file: Path) -> None:
    """Refuse a file that is empty or no Python, as one that was written half is not."""
    if file.suffix not in _SUFFIXES or not file.is_file():
        return  # MMCV's own message says it
    if not file.read_bytes().strip():
        raise ConfigError(f"{file}: the file is empty. Restore it.")
    if file.suffix != ".py":
        return
    try:
        ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:  # ValueError: bytes that are no text
        number, text = getattr(error, "lineno", None), (getattr(error, "text", None) or "").strip()
        raise ConfigError(
            f"{file}{f' line {number}' if number else ''} is not valid Python: {getattr(error, 'msg', error)}"
            f"{f' ({text})' if text else ''}. If the file was cut off while it was written or copied, restore it; "
            "otherwise correct the line."
        ) from error


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


def _check_top_level_keys(config: Config, files: list[Path], faults: Faults) -> None:
    """A name that is neither known nor read by the config's own code does nothing: most likely a typo."""
    helpers = _USUAL_VARIABLES.union(*(_names_read(file) for file in files))
    for key in config:
        if key not in KNOWN_KEYS and key not in helpers:
            faults.add(
                key,
                "unknown key, and the config does not use it as a variable either. Remove it."
                f"{suggest(key, KNOWN_KEYS)}",
            )


def _names_read(file: Path) -> set[str]:
    """Names that a file's own code reads, and those that it takes from its bases as `{{_base_.name}}`."""
    source = file.read_text(encoding="utf-8")
    names = set(re.findall(r"\{\{\s*_base_\.(\w+)", source))
    if file.suffix != ".py":
        return names
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names
