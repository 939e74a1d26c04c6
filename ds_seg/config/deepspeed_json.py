"""Read the DeepSpeed JSON and reconcile it with the run: batch sizes, precision, ZeRO stage."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ds_seg.config.batches import Batches
from ds_seg.config.faults import Faults, suggest
from ds_seg.config.files import CONFIGS_ROOT
from ds_seg.errors import ConfigError

DEFAULT_DEEPSPEED_JSON = CONFIGS_ROOT / "deepspeed" / "zero3_bf16.json"

_KNOWN_KEYS = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps bf16 zero_optimization
    communication_data_type data_types prescale_gradients gradient_predivide_factor sparse_gradients
    steps_per_print wall_clock_breakdown memory_breakdown dump_state zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer flops_profiler comms_logger torch_autocast aio checkpoint
    seq_parallel_communication_data_type gradient_clipping optimizer scheduler fp16 amp timers
    """.split()
)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""What the run decides of a step's crops."""
_SECTIONS_BY_MODEL = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "CommsLoggerConfig": "comms_logger",
    "DeepSpeedThroughputTimerConfig": "timers.throughput",
}
"""Where the values stand that a model of DeepSpeed's checks."""
_OFFLOADED_PARTS = ("offload_optimizer", "offload_param")
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
"""How a DeepSpeed JSON may spell it."""
_BF16_NAMES = ("bf16", "bfloat16", "torch.bfloat16")
_QUANTIZERS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
        ConfigError: it is missing, not a JSON object, or has a key twice.
    """
    if not path.is_file():
        shipped = ", ".join(str(file.name) for file in sorted(DEFAULT_DEEPSPEED_JSON.parent.glob("*.json")))
        raise ConfigError(
            f"DeepSpeed config '{path}' does not exist. Give a file with --deepspeed-config; "
            f"ds_seg ships {shipped} in {DEFAULT_DEEPSPEED_JSON.parent}."
        )
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_refuse_duplicates, path))
    except ValueError as error:
        raise ConfigError(
            f"DeepSpeed config '{path}' is not valid JSON: {error}. If the file was cut off while it was "
            "written or copied, restore it; otherwise correct the line."
        ) from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"DeepSpeed config '{path}' holds a {type(parsed).__name__}, want a JSON object.")
    return parsed


def _refuse_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(
            f"DeepSpeed config '{path}' has {', '.join(map(repr, twice))} more than once in one object, and only the "
            "last would count. Keep one."
        )
    return dict(pairs)


def resolve_deepspeed(
    given: Mapping[str, Any], batches: Batches, *, world_size: int, compiled: bool, faults: Faults
) -> dict[str, Any]:
    """The JSON as DeepSpeed gets it: `auto` filled in, everything that ds_seg owns set or refused.

    Args:
        given: the parsed file.
        batches: what one process does in a step.
        world_size: number of processes.
        compiled: whether blocks go through torch.compile.
        faults: gets a message for each contradiction.
    """
    faults.section("deepspeed", given, _KNOWN_KEYS)
    resolved = dict(given)
    _check_owned_by_run(given, faults)
    _check_zero(given.get("zero_optimization"), faults)
    _check_sums(given.get("data_types"), faults)
    micro_batch, accumulation_steps = batches.micro_batch, batches.accumulation_steps
    sizes = (micro_batch * accumulation_steps * world_size, micro_batch, accumulation_steps)
    batch = dict(zip(BATCH_KEYS, sizes, strict=True))
    for key, wanted in batch.items():
        got = given.get(key, "auto")
        if got not in ("auto", wanted):
            faults.add(
                f"deepspeed.{key}",
                f"got {got}, but the run makes it {wanted}: data.samples_per_gpu={micro_batch} x "
                f"{accumulation_steps} accumulation steps x {world_size} processes = {batch['train_batch_size']}. "
                'Write "auto" there, or change global_batch / data.samples_per_gpu.',
            )
    resolved.update(batch)
    bf16 = given.get("bf16", {"enabled": False})
    if not isinstance(bf16, dict) or not isinstance(bf16.get("enabled", False), bool):
        faults.add("deepspeed.bf16", f'got {bf16!r}, want {{"enabled": true}} or {{"enabled": false}}.')
    elif bf16.get("bf16_master_weights_and_grads"):
        faults.add("deepspeed.bf16.bf16_master_weights_and_grads", "got true, but masters stay FP32. Remove it.")
    resolved["gradient_clipping"] = 0.0  # left out, DeepSpeed 0.19.8 clips the backbone's own norm to 1
    resolved.setdefault("steps_per_print", 10**9)
    resolved.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the GPU twice a micro-batch
    if compiled:
        resolved["zero_optimization"] = _without_own_linear(given.get("zero_optimization"), faults)
    return resolved


def validate_by_deepspeed(resolved: Mapping[str, Any], path: Path) -> None:
    """Let DeepSpeed read the config now as it will when its engine is built.

    Args:
        resolved: what DeepSpeed gets, all "auto" settled.
        path: of the file, for messages.

    Raises:
        ConfigError: with DeepSpeed's reason for each value that it refuses.
    """
    logging.disable(logging.WARNING)  # DeepSpeed's, that there is no GPU: a plan needs none
    from deepspeed.runtime.config import DeepSpeedConfig  # here: an export does without DeepSpeed
    from pydantic import ValidationError

    logging.disable(logging.NOTSET)
    faults = Faults(f"DeepSpeed config '{path}'")
    # DeepSpeed multiplies batch sizes by the processes that run now; the run may be of another number
    own = {
        key: value for key, value in resolved.items() if key not in ("train_batch_size", "gradient_accumulation_steps")
    }
    try:
        DeepSpeedConfig(own)
    except ValidationError as error:
        section = _SECTIONS_BY_MODEL.get(error.title, error.title)
        for fault in error.errors():
            faults.add(*_describe_refusal(section, fault))
    except Exception as error:  # its other readers raise whatever a wrong value leads them to
        faults.add("deepspeed", f"{' '.join(str(error).split()).rstrip('.')} ({type(error).__name__}). Correct it.")
    faults.raise_if_any()


def _describe_refusal(section: str, fault: Mapping[str, Any]) -> tuple[str, str]:
    """The dotted field of one of pydantic's faults, and what is wrong with it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    field = ".".join(("deepspeed", section, *map(str, fault["loc"])))
    if fault["type"] == "extra_forbidden":
        known = (info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items())
        return field, f"unknown key.{suggest(field.rpartition('.')[2], known)} Correct or remove it."
    got = f"got {fault['input']!r}: " if fault["loc"] else ""
    return field, f"{got}{fault['msg']}. Correct or remove it."


def offloaded_share(deepspeed: Mapping[str, Any]) -> float:
    """The share of the backbone's optimizer state that is kept in host memory, 0 to 1."""
    offload = deepspeed["zero_optimization"].get("offload_optimizer") or {}
    return float(offload.get("ratio", 1.0)) if offload.get("device", "none") != "none" else 0.0


def uses_bf16(deepspeed: Mapping[str, Any]) -> bool:
    """Whether the backbone's parameters are bf16, FP32 otherwise; a `bf16` section that is none means nothing."""
    section = deepspeed.get("bf16")
    return isinstance(section, Mapping) and bool(section.get("enabled", False))


def suit_device(deepspeed: Mapping[str, Any], device_type: str) -> dict[str, Any]:
    """The config for CPUs or GPUs.

    Gloo's reduce_scatter takes almost twice the time of its all_reduce. After it DeepSpeed 0.19.8 copies gradients
    to multiply them by 1, unless they are scaled before; it divides by the number of processes before either way.

    Args:
        deepspeed: resolved; what it says of `reduce_scatter` and `prescale_gradients` stays.
        device_type: `cpu` or `cuda`.
    """
    if device_type != "cpu":
        return dict(deepspeed)
    zero = {"reduce_scatter": False, **deepspeed["zero_optimization"]}
    return {"prescale_gradients": not zero["reduce_scatter"], **deepspeed, "zero_optimization": zero}


def _without_own_linear(zero: Any, faults: Faults) -> Any:
    """DeepSpeed's own linear function breaks the graph of every layer that torch.compile would put into one."""
    if not isinstance(zero, dict):
        return zero
    if zero.get("memory_efficient_linear"):
        faults.add(
            "deepspeed.zero_optimization.memory_efficient_linear",
            "got true, which torch.compile can't see through. Remove it, or train without --compile.",
        )
    return {**zero, "memory_efficient_linear": False}


def _check_owned_by_run(given: Mapping[str, Any], faults: Faults) -> None:
    remedies = {
        "optimizer": "set `optimizer` in the run's config: both engines share it",
        "scheduler": "set `lr_config` in the run's config: both engines share it",
        "gradient_clipping": "set optimizer_config.grad_clip.max_norm in the run's config: DeepSpeed would clip by the "
        "backbone's norm alone, not by the joint norm of backbone and head",
    }
    for key, remedy in remedies.items():
        if given.get(key) not in (None, 0, 0.0, "auto", {}):
            faults.add(f"deepspeed.{key}", f"got {given[key]!r}, but this belongs to the run. Remove it and {remedy}.")
    for key in ("fp16", "amp"):
        section = given.get(key)
        if isinstance(section, dict) and section.get("enabled", False):
            faults.add(f"deepspeed.{key}", 'is enabled; the backbone trains in bf16. Use "bf16": {"enabled": true}.')


def _check_sums(data_types: Any, faults: Faults) -> None:
    section = faults.section("deepspeed.data_types", data_types, None)
    wanted = section.get("grad_accum_dtype")
    if wanted not in (None, *FP32_NAMES, *_BF16_NAMES):
        faults.add(
            "deepspeed.data_types.grad_accum_dtype",
            f"got {wanted!r}, want fp32 or bf16: what the backbone's gradients are summed in over micro-batches.",
        )


def _check_zero(zero: Any, faults: Faults) -> None:
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage") != 3:
        faults.add(
            "deepspeed.zero_optimization.stage",
            f"got {zero.get('stage')!r}, want 3: the backbone is built and loaded in shards. Set it to 3, also on one "
            "GPU.",
        )
    sections = {
        part: faults.section(f"deepspeed.zero_optimization.{part}", zero.get(part), None) for part in _OFFLOADED_PARTS
    }
    for part, section in sections.items():
        if section.get("device") == "nvme":
            faults.add(
                f"deepspeed.zero_optimization.{part}.device",
                "got 'nvme', want 'cpu': what DeepSpeed swaps to a disk of its own is in none of the files that a "
                "resume, an export or averages (EMAHook) could read.",
            )
    offload = sections["offload_optimizer"]
    ratio = offload.get("ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        faults.add(
            "deepspeed.zero_optimization.offload_optimizer.ratio",
            f"got {ratio!r}, want the share of the optimizer's state that host memory holds, above 0 and at most 1. "
            "`ds-seg plan` tells the least that fits; remove offload_optimizer where nothing has to be offloaded.",
        )
    for name in _QUANTIZERS:
        if zero.get(name):
            faults.add(
                f"deepspeed.zero_optimization.{name}",
                f"got {zero[name]!r}, which rounds what processes send each other to 8 or 4 bits: the run would not be "
                "the plain one any more. Remove it.",
            )
    for name, value in (
        ("offload_optimizer.super_offload", offload.get("super_offload")),
        ("zenflow", zero.get("zenflow")),
    ):
        if value:
            faults.add(
                f"deepspeed.zero_optimization.{name}",
                f"got {value!r}, which makes DeepSpeed step with another optimizer than ZeRO-3's: it knows no joint "
                "norm, and its state is in no checkpoint. Remove it.",
            )
