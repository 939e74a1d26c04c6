"""Keys that configs of InternVL's and MMSegmentation's world have and that mean nothing here, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_seg.config.deepspeed_json import DEFAULT_DEEPSPEED_JSON, load_deepspeed_json
from ds_seg.config.faults import Faults

_NO_MEANING = {
    "workflow": "training and evaluation alternate by evaluation.interval",
    "dist_params": "the collective backend follows the device",
    "log_level": "every message is shown",
    "cudnn_benchmark": "the backbone has no convolution worth tuning",
    "opencv_num_threads": "each worker uses one OpenCV thread",
    "mp_start_method": "torch's own default is used",
    "device": "the accelerator is the one DeepSpeed finds",
    "gpu_ids": "the launcher places processes",
    "deepspeed": "ZeRO-3 is always on",
    "fp16": "the precision is the DeepSpeed JSON's, and FP32 for the head",
    "model.backbone.use_flash_attn": "torch picks the fastest attention kernel that fits",
    "checkpoint_config.deepspeed": "every checkpoint is ZeRO-3's",
    "checkpoint_config.create_symlink": "the newest complete checkpoint is found by its name",
    "checkpoint_config.save_optimizer": "every checkpoint can be resumed from",
    "checkpoint_config.save_last": "the last step is always saved",
    "checkpoint_config.sync_buffer": "BatchNorm's statistics are the same on all ranks",
    "evaluation.pre_eval": "images are always compared one by one, in int64",
    "evaluation.gpu_collect": "ranks exchange their confusion matrices, and nothing else",
    "evaluation.rule": "a higher score is better",
    "evaluation.efficient_test": "images are always compared one by one, in int64",
    "evaluation.tmpdir": "ranks exchange their confusion matrices, and nothing else",
    "evaluation.broadcast_bn_buffer": "BatchNorm's statistics are the same on all ranks",
    "optimizer_config.loss_scale": "bf16 has the range of FP32",
    "optimizer_config.coalesce": "ZeRO-3 and DDP reduce the gradients",
    "optimizer_config.bucket_size_mb": "ZeRO-3 and DDP reduce the gradients",
    "optimizer_config.distributed": "ZeRO-3 and DDP reduce the gradients",
    "optimizer_config.detect_anomalous_params": "parameters without a gradient are found in a trial step",
    "data.persistent_workers": "the workers of training live until its end",
    "data.prefetch_factor": "torch's own default is used",
    "data.pin_memory": "memory is pinned where the device is a GPU",
}


def list_ignored_names(section: str) -> tuple[str, ...]:
    """Names that `section` may hold although they mean nothing here."""
    return tuple(key.rpartition(".")[2] for key in _NO_MEANING if key.rpartition(".")[0] == section)


def find_ignored(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys of `config` that mean nothing here, with the reason."""
    return {key: why for key, why in _NO_MEANING.items() if _holds(config, key)}


def _holds(config: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    if not isinstance(config, Mapping) or first not in config:
        return False
    return not rest or _holds(config[first], rest)


def choose_deepspeed_json(given: str | None, config: Mapping[str, Any], faults: Faults) -> tuple[Path, dict[str, str]]:
    """The DeepSpeed JSON of a run.

    `deepspeed_config` beside a `deepspeed` switch comes from InternVL's folders, where it names a file for ZeRO-1 that
    goes with their own setup. It is used only if it is there and fits.

    Args:
        given: what --deepspeed-config says.
        config: the MMSeg config.
        faults: gets a message where `deepspeed_config` is no name.

    Returns:
        The file, and what is ignored with the reason.

    Raises:
        ConfigError: the file that `deepspeed_config` names is not valid JSON.
    """
    named = faults.text("deepspeed_config", config)
    if given is not None or named is None:
        return Path(given or DEFAULT_DEEPSPEED_JSON), {}
    if "deepspeed" not in config:
        return Path(named), {}
    if config["deepspeed"] is not True:
        why = f"deepspeed is {config['deepspeed']!r}"
    elif not Path(named).is_file():
        why = f"there is no file {named}"
    else:
        zero = load_deepspeed_json(Path(named)).get("zero_optimization")
        stage = zero.get("stage") if isinstance(zero, Mapping) else None
        if stage == 3:
            return Path(named), {}
        why = f"{named} is for ZeRO stage {stage}"
    default = f"{why}; {DEFAULT_DEEPSPEED_JSON.name} is used, unless --deepspeed-config names another ZeRO-3 file"
    return DEFAULT_DEEPSPEED_JSON, {"deepspeed_config": default}
