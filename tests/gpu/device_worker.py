"""The only process of test_on_device.py: trains the tiny recipe on its device and tells what it saw there.

Usage: device_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cases import ALL, CASES
from checkpoint_hash import hash_tensors
from checks import run_checks
from comparison import compare_curves, compare_parameters, compare_statistics, compare_worst_tensor
from ds_seg import distributed
from ds_seg.engine.determinism import use_deterministic_algorithms
from ds_seg.engine.precision import validate_precision
from ds_seg.engine.step import TwoEngineStep
from ds_seg.models.layers import Attention, build_norm
from ds_seg.summary import describe_backbone, describe_heads
from mutations import MUTATIONS
from plain_trainer import PlainTrainer
from recipe import SIDE_PX, Recipe, make_micro_batches
from sharded import build_run, start
from sharded_trainer import ShardedTrainer, train_sharded

OUT = Path(sys.argv[1])
BF16 = Recipe(
    steps=12, bf16=True, lr=1e-3, layer_decay=0.6, weight_decay=0.05, auxiliary_weight=0.4, checkpointing="block"
)
MISTAKE = "layer ids off by one"
EVERYTHING = CASES[ALL].replace(steps=8, bad_steps=(1, 4))
ATTENTION = {"cpu": (5, 17), "cuda": (25, 1297)}
"""Heads of 128 channels, and tokens: those of the 6B model and a crop of 504 px, and something quick."""


def to_cpu(training: dict) -> dict:
    """With all tensors on the CPU."""
    return {
        key: {name: tensor.cpu() for name, tensor in value.items()} if isinstance(value, dict) else value
        for key, value in training.items()
    }


def compare(sharded: dict, recipe: Recipe) -> dict[str, float]:
    """How far two engines on this device lie from plain PyTorch on the CPU."""
    sharded = to_cpu(sharded)
    initial = {name: value.float() for name, value in sharded["initial"].items()}
    plain = PlainTrainer(recipe, initial).train()
    return {
        "losses": compare_curves(sharded["losses"], plain["losses"]),
        "norms": compare_curves(sharded["norms"], plain["norms"]),
        "parameters": compare_parameters(sharded["final"], plain["final"], initial),
        "worst parameter": compare_worst_tensor(sharded["final"], plain["final"], initial),
        "statistics": compare_statistics(sharded["final"], plain["final"]),
    }


def check_plain() -> dict:
    """The two-engine step against a plain loop in FP32: every knob at once, a mistake, and bf16."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default lets convolutions in FP32 round to 10 bits
    (mistake,) = (mutation for mutation in MUTATIONS if mutation.name == MISTAKE)
    return {
        "fp32": compare(train_sharded(EVERYTHING), EVERYTHING),
        "mistake": compare(mistake.train(), CASES[mistake.case]),
        "bf16": compare(train_sharded(BF16), BF16.replace(bf16=False)),
    }


def list_operators(work: Callable[[], object]) -> list[str]:
    """Names of torch's operators that a piece of work calls."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    return sorted({event.key for event in trace.key_averages()})


def check_kernels() -> dict:
    """Attention with the 6B model's heads, its norm, and a step with both optimizers."""
    device = distributed.device()
    heads, tokens = ATTENTION[device.type]
    with device:
        attention = Attention(128 * heads, heads, qkv_bias=False, qk_normalization=True).bfloat16()
        norm = build_norm("rms", 128 * heads).bfloat16()
        x_BND = torch.randn(1, tokens, 128 * heads).bfloat16().requires_grad_()
    run = build_run(BF16, 1)
    train_step = TwoEngineStep(start(run), run)
    # DeepSpeed makes the optimizer's state in its first step
    train_step(0, make_micro_batches(BF16, 0), scheduled_steps=0)
    return {
        "attention": list_operators(lambda: attention(x_BND).sum().backward()),
        "norm": list_operators(lambda: norm(x_BND).sum().backward()),
        "step": list_operators(lambda: train_step(1, make_micro_batches(BF16, 1), scheduled_steps=1)),
    }


def check_promises() -> dict:
    """Where the tensors are, and in which precision, after a step in bf16."""
    run = build_run(BF16, 1)
    engines = start(run)
    TwoEngineStep(engines, run)(0, make_micro_batches(BF16, 0), scheduled_steps=0)
    validate_precision(engines)
    engines.train(False)
    logits_BKHW = engines.encode_decode(torch.zeros(2, 3, SIDE_PX, SIDE_PX))
    tensors = [
        *engines.heads.parameters(),
        *engines.heads.buffers(),
        *(p.ds_tensor for p in engines.trainable_backbone),
    ]
    return {
        "devices": sorted({tensor.device.type for tensor in [*tensors, logits_BKHW]}),
        "backend": torch.distributed.get_backend(),
        "head": describe_heads(engines.heads),
        "backbone": describe_backbone(engines.backbone.module),
        "logits": str(logits_BKHW.dtype),
    }


def check_resume() -> dict:
    """All steps in one go, twice, and in two goes, with deterministic algorithms: hashes of what they leave."""
    use_deterministic_algorithms()
    recipe = EVERYTHING.replace(bf16=True)
    hashes = {}
    for name in ("straight", "again", "resumed"):
        trainer = ShardedTrainer(recipe, OUT / name)
        if name == "resumed":
            trainer.resume(OUT / "straight" / "checkpoints" / "step_000003")
        else:
            trainer.train(3)
            trainer.save()
        trainer.train(recipe.steps)
        hashes[name] = hash_tensors(trainer.save())
    return {"hashes": hashes, "deterministic": torch.are_deterministic_algorithms_enabled()}


if __name__ == "__main__":
    run_checks(globals())
