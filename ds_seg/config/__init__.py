"""MMSeg config file + DeepSpeed JSON + overrides -> one checked `RunConfig`."""

from ds_seg.config.files import CONFIGS_ROOT, read_config_file, resolve_config_path
from ds_seg.config.hooks import EmaSettings, WandbSettings
from ds_seg.config.intervals import CheckpointSettings, EvaluationSettings
from ds_seg.config.optimizer import KindMultipliers, OptimizerSettings
from ds_seg.config.run_config import RunConfig, RunOptions, build_run_config
from ds_seg.config.schedule import ScheduleSettings

__all__ = [
    "CONFIGS_ROOT",
    "CheckpointSettings",
    "EmaSettings",
    "EvaluationSettings",
    "KindMultipliers",
    "OptimizerSettings",
    "RunConfig",
    "RunOptions",
    "ScheduleSettings",
    "WandbSettings",
    "build_run_config",
    "read_config_file",
    "resolve_config_path",
]
