"""One checked, immutable description of a run: what every other room reads instead of raw config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config import notes
from ds_seg.config.batches import resolve_batches
from ds_seg.config.data_section import find_crop_size, validate_data
from ds_seg.config.deepspeed_json import (
    BATCH_KEYS,
    load_deepspeed_json,
    resolve_deepspeed,
    uses_bf16,
    validate_by_deepspeed,
)
from ds_seg.config.dialect import choose_deepspeed_json, find_ignored
from ds_seg.config.faults import Faults
from ds_seg.config.files import read_config_file, resolve_config_path
from ds_seg.config.hooks import EmaSettings, WandbSettings, read_custom_hooks, read_log_config
from ds_seg.config.intervals import CheckpointSettings, EvaluationSettings, read_checkpoints, read_evaluation
from ds_seg.config.limits import read_max_time, read_watchdog_timeout
from ds_seg.config.model_section import validate_model
from ds_seg.config.optimizer import OptimizerSettings, read_optimizer, read_optimizer_config
from ds_seg.config.schedule import ScheduleSettings, read_schedule
from ds_seg.config.zero_sizes import DEFAULT_LIVE_BYTES, find_auto_sizes, settle_zero_sizes

from mmcv import Config  # isort: skip


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to CONFIG."""

    config: str
    deepspeed_config: str | None = None
    work_dir: str | None = None
    resume: str | None = None
    load_from: str | None = None
    seed: int | None = None
    on_divergence: str | None = None
    checkpoint: str = "sync"
    compile: bool = False
    global_batch: int | None = None
    """Crops a step, whatever the config says: those of the checkpoint to resume from."""
    training: bool = True
    """Whether the run makes steps; without them any number of processes may share it."""
    max_time: str | None = None
    watchdog_timeout_s: float | None = None
    cfg_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """A run, resolved for its world size."""

    name: str
    mmseg: Config
    """The resolved MMSeg config; its `model` and `data` sections are MMSeg's own."""
    deepspeed: dict[str, Any]
    auto_sizes: tuple[str, ...]
    """Sizes under its zero_optimization that were "auto" and got a value from the size of the backbone."""
    work_dir: Path
    seed: int
    world_size: int
    micro_batch: int
    accumulation_steps: int
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    clip_norm: float | None
    max_skipped_steps: int
    max_rollbacks: int
    """How often a run that diverges may go back and leave out data; 0 stops it at once."""
    max_bad_samples: int
    """Training samples that may be replaced because their files can't be read."""
    log_interval_steps: int
    evaluation: EvaluationSettings
    checkpoints: CheckpointSettings
    ema: EmaSettings | None
    """How the weights are averaged; None where they are not."""
    wandb: WandbSettings
    load_from: str | None
    resume: str | None
    check_data: bool
    max_time_s: float | None
    """Seconds from the start of the command in which it must have ended; None for no limit."""
    watchdog_timeout_s: float
    """Seconds without progress after which a rank counts as stopped; 0: never."""
    find_unused_parameters: bool
    compile: bool
    """Whether training steps run the backbone's blocks through torch.compile."""
    notes: tuple[str, ...]
    """Lines for the log: keys of the config that have no meaning here, and why."""

    @property
    def model(self) -> Config:
        """MMSeg's `model` section."""
        return self.mmseg.model

    @property
    def data(self) -> Config:
        """MMSeg's `data` section."""
        return self.mmseg.data

    @property
    def global_batch(self) -> int:
        """Crops an optimizer step."""
        return self.micro_batch * self.accumulation_steps * self.world_size

    @property
    def bf16(self) -> bool:
        """Whether the backbone's parameters are bf16; FP32 otherwise."""
        return uses_bf16(self.deepspeed)

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone's parameters are, and what it computes in."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def workers(self) -> int:
        """Data loading processes a rank."""
        return int(self.data.get("workers_per_gpu", 2))

    @property
    def patch_size(self) -> int:
        """The backbone's patch in pixels."""
        return int(self.model.backbone.get("patch_size", 14))

    @property
    def train_crop_px(self) -> tuple[int, int]:
        """Height and width of a training crop; of the evaluation's window, or the backbone's image, where none is."""
        window = self.model.test_cfg.get("crop_size")
        size = find_crop_size(self.data.train) or window or self.model.backbone.get("img_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(height), int(width)


def build_run_config(options: RunOptions, world_size: int, *, with_engines: bool = True) -> RunConfig:
    """Read, merge and check everything that describes a run.

    Args:
        options: what the command line says.
        world_size: number of processes.
        with_engines: whether the run has engines, so that DeepSpeed is asked now what it thinks of its config.

    Raises:
        ConfigError: with every fault that was found.
    """
    path = resolve_config_path(options.config)
    config = read_config_file(path, {**options.cfg_options, **_as_config_keys(options)})
    faults = Faults(str(path))
    _require_sections(config, faults)
    validate_model(config.model, faults)
    validate_data(config.data, config.model.backbone.get("patch_size", 14), faults)
    deepspeed_path, ignored_json = choose_deepspeed_json(options.deepspeed_config, config, faults)
    asked = load_deepspeed_json(deepspeed_path)
    if not options.training:
        config.global_batch = None
        asked = {key: value for key, value in asked.items() if key not in BATCH_KEYS}
    run = _read_run(options, path.stem, config, asked, ignored_json, world_size=world_size, faults=faults)
    faults.raise_if_any()
    if with_engines:
        validate_by_deepspeed(run.deepspeed, deepspeed_path)
    return run


def _read_run(
    options: RunOptions,
    name: str,
    config: Config,
    asked: Mapping[str, Any],
    ignored_json: dict[str, str],
    *,
    world_size: int,
    faults: Faults,
) -> RunConfig:
    clip_norm, cumulative_iters = read_optimizer_config(config.get("optimizer_config"), faults)
    batches = resolve_batches(
        config, cumulative_iters=cumulative_iters, world_size=world_size, kept=options.global_batch, faults=faults
    )
    log_interval_steps, wandb, ignored_loggers = read_log_config(config.get("log_config"), faults)
    ema, ignored_hooks = read_custom_hooks(config.get("custom_hooks"), faults)
    switches = _read_switches(config, faults)
    deepspeed = resolve_deepspeed(asked, batches, world_size=world_size, compiled=switches["compile"], faults=faults)
    auto_sizes = find_auto_sizes(deepspeed.get("zero_optimization"), faults)
    ignored = find_ignored(dict(config.items())) | ignored_json | ignored_loggers | ignored_hooks
    optimizer = read_optimizer(config.optimizer, int(config.model.backbone.get("depth", 48)), faults)
    schedule = read_schedule(config.get("lr_config"), config.runner, optimizer.lr, faults)
    return RunConfig(
        name=name,
        mmseg=config,
        deepspeed=settle_zero_sizes(deepspeed, auto_sizes, config.model.backbone, DEFAULT_LIVE_BYTES),
        auto_sizes=auto_sizes,
        work_dir=Path(options.work_dir or faults.text("work_dir", config) or Path("work_dirs") / name).absolute(),
        seed=_read_seed(options, config, faults),
        world_size=world_size,
        micro_batch=batches.micro_batch,
        accumulation_steps=batches.accumulation_steps,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=clip_norm,
        max_skipped_steps=faults.integer("max_skipped_steps", config, 5, minimum=1),
        max_rollbacks=_read_max_rollbacks(config, faults),
        max_bad_samples=faults.integer("data.max_bad_samples", config.data, 0, minimum=0),
        log_interval_steps=log_interval_steps,
        evaluation=read_evaluation(config.get("evaluation"), schedule.max_steps, faults),
        checkpoints=read_checkpoints(
            config.get("checkpoint_config"), schedule.max_steps, options.checkpoint == "async", faults
        ),
        ema=ema,
        wandb=wandb,
        load_from=next(filter(None, _list_weights(config, faults)), None),
        resume=options.resume or _read_resume(config, faults),
        max_time_s=read_max_time(options.max_time, faults),
        watchdog_timeout_s=read_watchdog_timeout(options.watchdog_timeout_s, faults),
        notes=(*notes.of_ignored(ignored), *batches.notes, *notes.of_config(config, schedule, cumulative_iters)),
        **switches,
    )


def _require_sections(config: Config, faults: Faults) -> None:
    for section in ("model", "data", "optimizer", "runner"):
        if not isinstance(config.get(section), Mapping):
            faults.add(section, "missing; a run needs model, data, optimizer and runner.")
    faults.raise_if_any()


def _as_config_keys(options: RunOptions) -> dict[str, Any]:
    """Options that a config has a key for, so that the config in the work dir repeats the run without them."""
    said = {
        "seed": options.seed,
        "load_from": options.load_from,
        "on_divergence": options.on_divergence,
        "compile": options.compile or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def _read_seed(options: RunOptions, config: Config, faults: Faults) -> int:
    if options.seed is None:
        return faults.integer("seed", config, 0, minimum=0)
    return faults.integer("--seed", {"--seed": options.seed}, 0, minimum=0)


def _read_switches(config: Config, faults: Faults) -> dict[str, bool]:
    return {
        "check_data": faults.flag("check_data", config, True),
        "find_unused_parameters": faults.flag("find_unused_parameters", config, False),
        "compile": faults.flag("compile", config, False),
    }


def _read_max_rollbacks(config: Config, faults: Faults) -> int:
    wanted = config.get("on_divergence", "stop")
    if wanted not in ("stop", "rollback"):
        faults.add("on_divergence", f"got {wanted!r}, want 'stop' or 'rollback'.")
    most = faults.integer("max_rollbacks", config, 3, minimum=1)
    return most if wanted == "rollback" else 0


def _list_weights(config: Mapping[str, Any], faults: Faults) -> list[str | None]:
    """Where a config may name the weights to start from, first choice first.

    The last is a variable of InternVL's configs. Not all of them hand it to the backbone, and a run on random values
    is none that anyone wants.
    """
    model = config["model"]
    in_model = [
        faults.text("model.pretrained", model),
        faults.text("model.backbone.pretrained", model["backbone"]),
    ]
    return [faults.text("load_from", config), *in_model, faults.text("pretrained", config)]


def _read_resume(config: Config, faults: Faults) -> str | None:
    given = faults.text("resume_from", config)
    if given and Path(given).suffix == ".pth":
        faults.add(
            "resume_from",
            f"got {given!r}, but a .pth file holds no ZeRO-3 optimizer to go on with. Start from its weights with "
            "load_from (--load-from), or name a checkpoint of ds_seg, or 'auto'.",
        )
    return given or ("auto" if faults.flag("auto_resume", config, False) else None)
