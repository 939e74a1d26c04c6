"""How a training is started as planned: its DeepSpeed JSON and its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ds_seg.config import RunConfig, ScheduleSettings
from ds_seg.config.deepspeed_json import BATCH_KEYS
from ds_seg.models.checkpointing import resolve_policy
from ds_seg.planning.candidates import Candidate

_DEFAULTS = ("steps_per_print", "timers")


def build_deepspeed_json(candidate: Candidate) -> dict[str, Any]:
    """The DeepSpeed config with numbers for all sizes; those of the batch come from the run."""
    resolved = {key: value for key, value in candidate.deepspeed.items() if key not in _DEFAULTS}
    return {**resolved, **dict.fromkeys(BATCH_KEYS, "auto")}


def build_train_arguments(run: RunConfig, config: str, cfg_options: Sequence[str], candidate: Candidate) -> list[str]:
    """CONFIG and the options that make the run what was planned.

    Args:
        run: as configured, built for a world of one.
        config: CONFIG as it was given.
        cfg_options: `--cfg-options` as they were given.
        candidate: the plan.
    """
    batch, schedule = candidate.batch, run.schedule
    options = dict(option.split("=", 1) for option in cfg_options)
    if batch.micro_batch != run.micro_batch:
        options["data.samples_per_gpu"] = f"{batch.micro_batch}"
    cumulative = (run.mmseg.get("optimizer_config") or {}).get("cumulative_iters")
    if cumulative not in (None, batch.accumulation_steps):
        options["optimizer_config.cumulative_iters"] = f"{batch.accumulation_steps}"
    following = batch.gpus * batch.micro_batch * (1 if cumulative is None else batch.accumulation_steps)
    if run.mmseg.get("global_batch", following) != batch.images:
        options["global_batch"] = f"{batch.images}"
    if batch.max_steps != schedule.max_steps:
        options["runner.max_iters"] = f"{batch.max_steps}"
        options |= _rescale_schedule(schedule, batch.max_steps)
    backbone = run.model.backbone
    if candidate.checkpointing != (backbone.get("checkpointing") or resolve_policy(None, backbone.get("with_cp"))):
        options |= _change_policy(backbone, candidate.checkpointing)
    return [config, *(["--cfg-options", *map("=".join, options.items())] if options else [])]


def _rescale_schedule(schedule: ScheduleSettings, max_steps: int) -> dict[str, str]:
    """What of `lr_config` is counted in steps, for a run of `max_steps`."""

    def rescale(steps: int) -> str:
        return f"{math.ceil(steps * max_steps / schedule.max_steps)}"

    options = {"lr_config.warmup_iters": rescale(schedule.warmup_steps)} if schedule.warmup_steps else {}
    for key in ("step", "periods"):
        value = schedule.lr_hook.get(key)
        if value is not None:
            steps = rescale(value) if isinstance(value, int) else f"[{','.join(map(rescale, value))}]"
            options[f"lr_config.{key}"] = steps
    return options


def _change_policy(backbone: Any, policy: str) -> dict[str, str]:
    """InternVL's flag is turned with it, since the two must not contradict each other."""
    options = {"model.backbone.checkpointing": policy}
    if backbone.get("with_cp") is not None and backbone["with_cp"] == (policy == "none"):
        options["model.backbone.with_cp"] = f"{policy != 'none'}"
    return options
