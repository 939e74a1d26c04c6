"""One rank of test_engine_distributed.py: trains, skips, saves and resumes on a tiny model.

Start it with two ranks first, then with one, both on the same folder: the single rank reads what the two wrote.
Usage: engine_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import shutil
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_local_fp32_param

from checks import run_checks
from ds_seg import distributed
from ds_seg.checkpoint import (
    TrainingState,
    list_checkpoints,
    load_weights_from_checkpoint,
    resume_training,
    save_checkpoint,
)
from ds_seg.engine.engines import Engines, build_modules
from ds_seg.engine.step import StepResult
from ds_seg.engine.zero3 import JointNormZero3, local_master
from ds_seg.errors import CheckpointError, ConfigError
from ds_seg.summary import describe_backbone, describe_heads
from engine_setup import RECIPE, CountingStep, digest, make_micro_batches, make_run, start, train
from recipe import DEPTH
from sharded import change_zero, collect_weights

from mmcv import Config  # isort: skip

OUT = Path(sys.argv[1])
NAN = float("nan")


def world() -> int:
    return distributed.world_size()


def save_tensors(name: str, tensors: dict) -> None:
    if distributed.is_main():
        torch.save(tensors, OUT / f"{name}_world{world()}.pt")


def check_training() -> dict:
    """What is promised of a run in FP32 and of one in bf16; what they compute is proven in tests/parity."""
    return {precision: describe_training(precision) for precision in ("fp32", "bf16")}


def describe_training(precision: str) -> dict:
    engines, train_step = start(make_run(precision))
    results, clipped_norms = train_and_measure(engines, train_step)
    backbone = describe_backbone(engines.backbone.module)  # a forward without a backward leaves parameters gathered
    engines.train(False)
    logits_BKHW = engines.encode_decode(torch.zeros(1, 3, 56, 70))
    return {
        "entries": sorted(results[0].losses),
        "norms": [result.grad_norm for result in results],
        "factors": [result.clip_factor for result in results],
        "clipped_norms": clipped_norms,
        "optimizer": type(engines.backbone.optimizer.optimizer).__name__,
        "logits": [list(logits_BKHW.shape), str(logits_BKHW.dtype), logits_BKHW.requires_grad],
        "heads": describe_heads(engines.heads),
        "backbone": backbone,
    }


def train_and_measure(engines: Engines, train_step: CountingStep) -> tuple[list[StepResult], list[float]]:
    """Six steps, and the joint norm of what the optimizers stepped with in each."""
    squares: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, replicas: int) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares.extend(gradient.square().sum().item() / replicas for gradient in gradients)

    engines.head_optimizer.register_step_pre_hook(lambda optimizer, *_: measure(optimizer, world()))
    engines.backbone.optimizer.optimizer.register_step_pre_hook(lambda optimizer, *_: measure(optimizer, 1))
    results, norms = [], []
    for step in range(6):
        squares.clear()
        results += train(train_step, range(step, step + 1))
        norms.append(math.sqrt(distributed.reduce_sum(torch.tensor(math.fsum(squares))).item()))
    return results, norms


def check_no_clipping() -> dict:
    """Gradients with a norm far above 1 and no clipping asked for."""
    run = dataclasses.replace(make_run("bf16"), clip_norm=None)
    engines, train_step = start(run)
    engines.heads.register_forward_hook(lambda _module, _args, losses: {k: 50 * v for k, v in losses.items()})
    results, norms = train_and_measure(engines, train_step)
    return {"norms": [result.grad_norm for result in results], "stepped": norms}


def check_zero3_step() -> dict:
    """DeepSpeed's own step, which flattens gradients and takes a norm of its own, moves everything alike."""
    report = {}
    for precision in ("fp32", "bf16"):
        run = change_zero(make_run(precision), sub_group_size=30_000)
        digests, factors = [], []
        for kind in (JointNormZero3, DeepSpeedZeroOptimizer_Stage3):
            engines, train_step = start(run)
            engines.backbone.optimizer.__class__ = kind
            factors.append([result.clip_factor for result in train(train_step, range(4))])
            digests.append(digest(engines))
        sub_groups = len(engines.backbone.optimizer.fp16_groups)
        report[precision] = {"sub_groups": sub_groups, "digests": digests, "factors": factors}
    return report


def check_reduction() -> dict:
    """Gradients from a reduce_scatter, which GPUs take, beside those from an all_reduce, which CPUs take."""
    report = {}
    for precision in ("fp32", "bf16"):
        digests = []
        for scatters in (False, True):
            engines, train_step = start(change_zero(make_run(precision), reduce_scatter=scatters))
            assert engines.backbone.optimizer.reduce_scatter == scatters
            train(train_step, range(4))
            digests.append(digest(engines))
        report[precision] = digests
    return report


def check_optimizer_tensors() -> dict:
    """What is kept out of loading workers: masters, their gradients and moments, the gradients of all parameters."""
    run = change_zero(make_run("bf16"), offload_optimizer={"device": "cpu"})
    engines, train_step = start(run)
    train(train_step, range(1))
    shards = sum(parameter.ds_tensor.numel() for parameter in engines.trainable_backbone)
    kept = list(engines.optimizer_tensors())
    masters = {name: local_master(parameter) for name, parameter in engines.backbone.module.named_parameters()}
    same = all(
        torch.equal(master, safe_get_local_fp32_param(engines.backbone.module.get_parameter(name)))
        for name, master in masters.items()
    )
    owners = {master.untyped_storage().data_ptr() for master in masters.values()}
    return {
        "optimizer": type(engines.backbone.optimizer.optimizer).__name__,
        "fp32": sum(tensor.numel() for tensor in kept if tensor.dtype == torch.float32 and tensor.dim()) / shards,
        "bf16": sum(tensor.numel() for tensor in kept if tensor.dtype == torch.bfloat16) / shards,
        "masters_agree": same and owners <= {tensor.untyped_storage().data_ptr() for tensor in kept},
    }


def check_sharding() -> dict:
    """What each rank holds when the backbone has just been built, before DeepSpeed's engine sees it."""
    backbone, _ = build_modules(make_run("bf16"))
    parameters = list(backbone.parameters())
    return {
        "whole": sum(p.numel() for p in parameters),
        "shards": sum(p.ds_tensor.numel() for p in parameters),
        "padding": len(parameters) * (world() - 1),
        "all": sum(p.ds_numel for p in parameters),
    }


def poison_images(_engines: Engines, batches: list) -> list:
    batches[0].images_B3HW.fill_(NAN)
    return []


def poison_head_gradient(engines: Engines, _batches: list) -> list:
    return [engines.heads.decode_head.conv_seg.weight.register_hook(lambda grad: grad * NAN)]


def poison_backbone_gradient(engines: Engines, _batches: list) -> list:
    """The gradient that leaves the heads; the heads' own gradients and the loss stay finite."""

    def hook(_module: torch.nn.Module, args: tuple) -> None:
        args[0][0].register_hook(lambda grad: grad * NAN)

    return [engines.heads.register_forward_pre_hook(hook)]


def poison_loss(engines: Engines, _batches: list) -> list:
    """A loss that is not finite while every gradient is."""

    def hook(_module: torch.nn.Module, _args: tuple, entries: dict) -> dict:
        return {**entries, "loss_ce": entries["loss_ce"] + NAN}

    return [engines.heads.register_forward_hook(hook)]


def overflow_activations(_engines: Engines, batches: list) -> list:
    """Infinities where bf16 ends, and NaNs where they meet zeros."""
    batches[0].images_B3HW.mul_(3e38)
    return []


def overflow_backbone_gradient(engines: Engines, _batches: list) -> list:
    """What leaves the heads is finite, and overflows on its way through the backbone."""

    def hook(_module: torch.nn.Module, args: tuple) -> None:
        args[0][0].register_hook(lambda grad: grad.sign() * 3e38)

    return [engines.heads.register_forward_pre_hook(hook)]


def overflow_head_gradient(engines: Engines, _batches: list) -> list:
    return [engines.heads.decode_head.conv_seg.weight.register_hook(lambda grad: grad.abs() * 1e38 * 1e38)]


POISONS = (
    poison_images,
    poison_head_gradient,
    poison_backbone_gradient,
    poison_loss,
    overflow_activations,
    overflow_backbone_gradient,
    overflow_head_gradient,
)


def skip_once(train_step: CountingStep, step: int, poison) -> dict:
    """One bad step, bad on the last rank only, then a good one."""
    engines = train_step.engines
    before, scheduled = digest(engines), train_step.scheduled_steps
    batches = make_micro_batches(step)
    handles = poison(engines, batches) if distributed.rank() == world() - 1 else []
    bad = train_step(step, batches)
    for handle in handles:
        handle.remove()
    moved = digest(engines) != before
    rates = [group["lr"] for group in engines.param_groups]
    (good,) = train(train_step, range(step + 1, step + 2))
    return {
        "skipped": bad.skipped,
        "moved": moved,
        "bad_loss": bad.losses["loss"],
        "bad_norm": bad.grad_norm,
        "scheduled": train_step.scheduled_steps - scheduled,
        "same_rates": rates == [group["lr"] for group in engines.param_groups],
        "good_skipped": good.skipped,
        "good_loss": good.losses["loss"],
        "good_moved": digest(engines) != before,
        "finite": all(torch.isfinite(tensor).all().item() for tensor in collect_weights(engines).values()),
        "identical": describe_heads(engines.heads)["replicas_identical"],
    }


def check_skips() -> dict:
    report = {}
    for kind in ("fp32", "bf16", "frozen") if world() > 1 else ("bf16",):
        options = {"freeze_vit": True} if kind == "frozen" else {}
        engines, train_step = start(make_run("fp32" if kind == "fp32" else "bf16", **options))
        train(train_step, range(1))
        poisons = {"fp32": POISONS[:1], "bf16": POISONS, "frozen": POISONS[:2]}[kind]
        report[kind] = {p.__name__: skip_once(train_step, 1 + 2 * i, p) for i, p in enumerate(poisons)}
        if kind != "frozen":
            assert engines.backbone.skipped_steps == len(poisons)
    return report


def live_bytes() -> int:
    """Bytes of all tensors that this process can reach, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_sparse]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_memory(**options) -> dict:
    """Bytes that building and two training steps leave behind, for each backbone parameter of this rank's shard."""
    run = change_zero(make_run("bf16", **options), reduce_bucket_size=1000)  # the model is smaller than the usual one
    before = live_bytes()
    engines, train_step = start(run)
    weights = collect_weights(engines)
    train(train_step, range(2))
    moved = {name for name, tensor in collect_weights(engines).items() if not torch.equal(tensor, weights[name])}
    parameters = list(engines.backbone.module.parameters())
    del weights
    return {
        "bytes_per_parameter": (live_bytes() - before) / sum(p.ds_tensor.numel() for p in parameters),
        "optimizer": type(engines.backbone.optimizer).__name__,
        "gradient_partitions": hasattr(engines.backbone.optimizer, "averaged_gradients"),
        "gradients": sum(p.grad is not None for p in parameters),
        "moved_backbone": sum(name.startswith("backbone.") for name in moved),
        "moved_heads": sum(not name.startswith("backbone.") for name in moved),
        "group_names": [name for group in engines.param_groups for name in group["names"]],
    }


def check_frozen() -> dict:
    return {"frozen": measure_memory(freeze_vit=True), "trained": measure_memory()}


def check_whole_parameters() -> dict:
    """The share of the backbone that is whole when its forward pass ends, once DeepSpeed knows the order of use."""
    pyramid = {"freeze_vit": True, "with_fpn": True, "depth": 4, "out_indices": [0, 1, 2, 3]}
    frozen, trained = make_run("bf16", **pyramid), make_run("bf16")
    kept = trained.deepspeed["zero_optimization"]["stage3_max_reuse_distance"]
    runs = {
        "trained": trained,
        "frozen": frozen,
        "frozen_kept": change_zero(frozen, stage3_max_reuse_distance=10 * kept),
    }
    report = {}
    for name, run in runs.items():
        engines, train_step = start(run)
        parameters, shares = list(engines.backbone.module.parameters()), []

        def measure(*_args: object, parameters: list = parameters, shares: list = shares) -> None:
            whole = sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
            shares.append(whole / sum(p.ds_numel for p in parameters))

        engines.heads.register_forward_pre_hook(measure)
        losses = [result.losses["loss"] for result in train(train_step, range(3))]
        report[name] = {"share": shares[-1], "losses": losses}
    return report


CHECKPOINTED = {"trained": {}, "frozen": {"freeze_vit": True}, "part": {"freeze_vit": True, "unfreeze_pos_embed": True}}


def check_resume() -> dict:
    """One step, save, three more; against a start from other values that resumes and makes the same three."""
    report = {}
    for kind in CHECKPOINTED if world() > 1 else ("trained",):
        options = CHECKPOINTED[kind]
        run = make_run("bf16", OUT / f"{kind}_world{world()}", **options)
        engines, train_step = start(run)
        train(train_step, range(1))
        state = TrainingState(step=2, scheduled_steps=1, skipped_steps=1, best_score=0.5, best_checkpoint="step_000001")
        folder = save_checkpoint(engines, run, state)
        saved = digest(engines)
        save_tensors(kind, collect_weights(engines))
        wanted = [result.losses for result in train(train_step, range(2, 5))], digest(engines)
        again, _ = start(dataclasses.replace(run, seed=run.seed + 1))
        train_again = CountingStep(again, run)
        fresh = digest(again)
        resumed = resume_training(folder, again, run)
        train_again.scheduled_steps = resumed.scheduled_steps
        loaded = digest(again)
        got = [result.losses for result in train(train_again, range(2, 5))], digest(again)
        report[kind] = {
            "state": resumed == state,
            "fresh_differs": fresh != saved,
            "loaded": loaded == saved,
            "losses": got[0] == wanted[0],
            "end": got[1] == wanted[1],
            "name": folder.name,
            "listed": list_checkpoints(run.work_dir) == [folder],
        }
    return report


def check_linked_backbone() -> dict:
    """A second checkpoint of a frozen backbone shares the first one's file."""
    run = make_run("bf16", OUT / f"linked_world{world()}", freeze_vit=True)
    engines, _ = start(run)
    first, second = (save_checkpoint(engines, run, TrainingState(step=step)) for step in (1, 2))
    inodes = [(folder / "backbone.safetensors").stat().st_ino for folder in (first, second)]
    again = save_checkpoint(engines, run, TrainingState(step=2))
    stale = sorted(path.name for path in run.work_dir.joinpath("checkpoints").iterdir())
    return {"shared": inodes[0] == inodes[1], "again": again == second, "folders": stale}


def check_load_weights() -> dict:
    """Weights of the two-rank checkpoints, on any world size, before the engines are made."""
    report = {}
    for kind, options in CHECKPOINTED.items():
        run = make_run("bf16", **options)
        backbone, heads = build_modules(run)
        load_weights_from_checkpoint(OUT / f"{kind}_world2" / "checkpoints" / "step_000002", backbone, heads)
        weights = collect_weights(Engines(backbone, heads, run, training=False))
        saved = torch.load(OUT / f"{kind}_world2.pt")
        different = [name for name in saved if not torch.equal(saved[name], weights[name])]
        report[kind] = {"different": different, "tensors": len(weights), "same_names": list(saved) == list(weights)}
    return report


def check_other_classes() -> dict:
    """Weights of a checkpoint as a start for heads with more classes, and with another structure."""
    run = make_run("bf16")
    folder = OUT / "trained_world2" / "checkpoints" / "step_000002"
    model = copy.deepcopy(run.model)
    model.decode_head.num_classes += 1
    model.auxiliary_head.with_norm = False
    backbone, heads = build_modules(dataclasses.replace(run, mmseg=Config({**run.mmseg, "model": model})))
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    loaded = load_weights_from_checkpoint(folder, backbone, heads, needs_heads=False)
    taken = [name for name, value in heads.state_dict().items() if not torch.equal(value, before[name])]
    return {
        "left_initial": loaded.left_initial,
        "taken": taken,
        "needed": catch(load_weights_from_checkpoint, folder, backbone, heads),
    }


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "flipped": (flip_byte, "backbone/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "missing": (Path.unlink, "heads.pt"),
    "truncated": (truncate, "state.json"),
    "manifest": (truncate, "manifest.json"),
    "absent": (Path.unlink, "manifest.json"),
}


def catch(function, *args) -> str:
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)
    return "no error"


def check_damage() -> dict:
    run = make_run("bf16")
    engines, _ = start(run)
    before, report = digest(engines), {}
    whole = OUT / "trained_world2" / "checkpoints" / "step_000002"
    for name, (damage, file) in DAMAGES.items():
        folder = OUT / f"damaged_world{world()}" / name / "step_000002"
        if distributed.is_main():
            shutil.copytree(whole, folder)
            damage(folder / file)
        distributed.barrier()
        resumed = catch(resume_training, folder, engines, run)
        loaded = catch(load_weights_from_checkpoint, folder, engines.backbone.module, engines.heads)
        report[name] = {"message": resumed, "loading": loaded, "unmoved": digest(engines) == before}
    return report


def check_mismatches() -> dict:
    run = make_run("bf16")
    engines, _ = start(run)
    before = digest(engines)
    folder = OUT / "trained_world2" / "checkpoints" / "step_000002"
    frozen = OUT / "frozen_world2" / "checkpoints" / "step_000002"
    other_run = make_run("bf16", depth=DEPTH + 1)
    backbone, heads = build_modules(other_run)
    return {
        "seed": catch(resume_training, folder, engines, dataclasses.replace(run, seed=5)),
        "batch": catch(
            resume_training, folder, engines, dataclasses.replace(run, accumulation_steps=RECIPE.accumulation + 1)
        ),
        "frozen": catch(resume_training, frozen, engines, run),
        "model": catch(load_weights_from_checkpoint, folder, backbone, heads),
        "unmoved": digest(engines) == before,
    }


def check_bad_configs() -> dict:
    messages = {}
    for name, options in (("argument", {"bogus": 1}), ("heads", {"num_heads": 5}), ("channels", {"embed_dim": 42})):
        try:
            build_modules(make_run("bf16", **options))
            messages[name] = "no error"
        except ConfigError as error:
            messages[name] = str(error)
    return messages


ONLY_TWO_RANKS = ("check_sharding", "check_frozen", "check_linked_backbone", "check_damage")


if __name__ == "__main__":
    run_checks(globals(), only_several_ranks=ONLY_TWO_RANKS)
