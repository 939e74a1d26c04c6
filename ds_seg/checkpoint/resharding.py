"""Bring a trained backbone back into the shards of any number of ranks: weights, FP32 masters and Adam's state.

A flat parameter is cut into equal parts, one a rank. So a rank of the new run knows which elements it holds, and reads
just these from the files of the ranks that held them: no file is converted, nothing is exchanged, and nobody holds
more than its own part and one parameter. The same number of ranks is no special case.
"""

from __future__ import annotations

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch.nn import functional

from ds_seg.checkpoint.shards import MASTER, SavedShards
from ds_seg.engine.engines import Engines, own_stretch

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def load_backbone(saved: SavedShards, engines: Engines) -> None:
    """Load this rank's part of everything that DeepSpeed holds, and its counters; a collective over all ranks.

    Rates, decays and betas stay those of the run (see `validate_same_rates`): DeepSpeed's own conversion gives every
    group those of the first.

    Args:
        saved: of the same parameters, of any number of ranks.
        engines: with a backbone that trains.
    """
    zero = engines.backbone.optimizer
    zero.checkpoint_event_prologue()  # parameters that are gathered would keep their old values
    steps = saved.optimizer_steps
    _make_optimizer_state(engines, steps)
    for name, parameter in engines.backbone.module.named_parameters():
        trained = name in saved.trained
        for what in (MASTER, *MOMENTS) if trained and steps is not None else (MASTER,):
            start, stop = own_stretch(parameter)
            own = saved.read(name, what, start, stop)
            padded = functional.pad(own, (0, parameter.ds_tensor.numel() - own.numel()))
            if what != MASTER:
                safe_set_local_optimizer_state(parameter, padded, what)
                continue
            parameter.ds_tensor.copy_(padded)  # a bf16 weight is the rounding of its master
            if trained:
                safe_set_local_fp32_param(parameter, padded)
    zero.checkpoint_event_epilogue()
    _set_counters(saved, engines)


def _make_optimizer_state(engines: Engines, steps: int | None) -> None:
    """Room for the moments, and a step count of its own for each of DeepSpeed's flat tensors."""
    zero = engines.backbone.optimizer
    zero.optimizer.state.clear()
    if steps is None:
        return
    for sub_group_id, flat in enumerate(zero.fp32_partitioned_groups_flat):
        optimizer = zero.optimizer_of(sub_group_id)
        counts_in_python = isinstance(optimizer, DeepSpeedCPUAdam)
        count = steps if counts_in_python else torch.tensor(float(steps), device=flat.device)
        optimizer.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}


def _set_counters(saved: SavedShards, engines: Engines) -> None:
    for name, count in saved.counters.items():
        setattr(engines.backbone, name, count)
    engines.backbone.micro_steps = engines.backbone.global_steps * engines.backbone.gradient_accumulation_steps()
