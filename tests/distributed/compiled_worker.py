"""One rank of test_compiled_blocks.py: a few steps without compilation, and with it under every policy.

Usage: compiled_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
from torch._dynamo.utils import counters

from checks import run_checks
from ds_seg.config import RunConfig
from ds_seg.engine.engines import Engines
from ds_seg.models import compilation
from ds_seg.models.checkpointing import POLICIES
from engine_setup import make_run, start, train

STEPS = 2


def check_compiled() -> dict:
    return {policy: run(make_compiled_run(policy)) for policy in POLICIES}


def check_a_breaking_block() -> dict:
    """A block whose forward pass the compiler can't keep in one graph."""
    real = compilation.run_block

    def breaking(*args: object) -> torch.Tensor:
        torch._dynamo.graph_break()
        return real(*args)  # type: ignore[arg-type]

    with mock.patch.object(compilation, "run_block", breaking):
        return run(make_compiled_run("none"))


def check_eager() -> dict:
    """Last: DeepSpeed's own linear function, which an eager run has, stays in the process from here on."""
    return run(make_run("fp32", checkpointing="none"))


def make_compiled_run(policy: str) -> RunConfig:
    compiled = dataclasses.replace(make_run("fp32", checkpointing=policy), compile=True)
    compiled.deepspeed["zero_optimization"]["memory_efficient_linear"] = False
    return compiled


def run(config: RunConfig) -> dict:
    torch._dynamo.reset()
    counters.clear()
    engines, train_step = start(config)
    results = train(train_step, range(STEPS))
    training_graphs = counters["stats"]["unique_graphs"]
    engines.train(False)
    for side in (56, 70):
        engines.encode_decode(torch.zeros(1, 3, side, 56))
    return {
        "losses": [result.losses["loss"] for result in results],
        "norms": [result.grad_norm for result in results],
        "graphs": training_graphs,
        "graphs_of_evaluations": counters["stats"]["unique_graphs"] - training_graphs,
        "breaks": sum(counters["graph_break"].values()),
        "kept_bytes": count_kept_bytes(engines),
    }


def count_kept_bytes(engines: Engines) -> int:
    """What a forward pass of the backbone keeps for the backward pass, parameters and what a checkpoint hides aside."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    engines.train(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = engines.backbone(torch.zeros(2, 3, 56, 56))
    engines.backbone.backward(sum(feature.sum() for feature in features))
    return sum(sizes.values())


if __name__ == "__main__":
    run_checks(globals())
