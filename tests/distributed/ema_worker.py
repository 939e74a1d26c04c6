"""One rank of test_ema_distributed.py: averages the weights of a tiny training, swaps them in, saves and loads them.

Start it with two ranks first, then with one, both on the same folder: the single rank reads what the two wrote.
Usage: ema_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from checks import run_checks
from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, load_weights_from_checkpoint, resume_training, save_checkpoint
from ds_seg.config import EmaSettings, RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines, build_modules
from ds_seg.summary import describe_averages
from engine_setup import CountingStep, digest, make_micro_batches, make_run, start, train
from engine_worker import catch, flip_byte, live_bytes, poison_images
from sharded import change_zero, collect_weights

OUT = Path(sys.argv[1])
SETTINGS = {
    "every_step": EmaSettings(momentum=0.4, interval_steps=1, warm_up_steps=10),  # the warm-up binds all along
    "every_third": EmaSettings(momentum=0.7, interval_steps=3, warm_up_steps=10),
}
STEPS, BAD_STEP = 6, 2
IMAGE_B3HW = torch.randn(1, 3, 56, 70, generator=torch.Generator().manual_seed(0))


def world() -> int:
    return distributed.world_size()


def collect_masters(engines: Engines) -> dict[str, torch.Tensor]:
    """All trainable weights in FP32 under their full names."""
    masters = {name: p.detach().clone() for name, p in engines.heads.named_parameters()}
    for name, parameter in engines.backbone.module.named_parameters():
        if parameter.requires_grad:
            masters[f"backbone.{name}"] = safe_get_full_fp32_param(parameter).clone()
    return masters


def collect_averages(ema: WeightAverages) -> dict[str, torch.Tensor]:
    """All averages, whole, under their full names."""
    ranks = distributed.gather_objects(ema.backbone)
    shapes = {name: p.ds_shape for name, p in ema.engines.backbone.module.named_parameters()}
    whole = {f"backbone.{name}": torch.cat([rank[name] for rank in ranks]).view(shapes[name]) for name in ranks[0]}
    return whole | {name: average.clone() for name, average in ema.heads.items()}


def train_with(train_step: CountingStep, ema: WeightAverages, steps: range) -> None:
    for step in steps:
        scheduled = train_step.scheduled_steps
        if not train_step(step, make_micro_batches(step)).skipped:
            ema.update(scheduled)


def check_averages() -> dict:
    """Weights after every step and the averages at the end, with one skipped step, for the test to compare."""
    report = {}
    for precision in ("fp32", "bf16") if world() > 1 else ("fp32",):
        engines, train_step = start(make_run(precision))
        averages = {name: WeightAverages(engines, settings) for name, settings in SETTINGS.items()}
        masters, weights, skipped = [collect_masters(engines)], [collect_weights(engines)], []
        for step in range(STEPS):
            batches = make_micro_batches(step)
            if step == BAD_STEP and distributed.rank() == world() - 1:
                poison_images(engines, batches)
            scheduled = train_step.scheduled_steps
            result = train_step(step, batches)
            skipped.append(result.skipped)
            if not result.skipped:
                for ema in averages.values():
                    ema.update(scheduled)
            masters.append(collect_masters(engines))
            weights.append(collect_weights(engines))
        whole = {name: collect_averages(ema) for name, ema in averages.items()}
        if distributed.is_main():
            content = {"masters": masters, "weights": weights, "averages": whole}
            torch.save(content, OUT / f"{precision}_world{world()}.pt")
        report[precision] = {"skipped": skipped, "described": describe_averages(averages["every_step"])}
    return report


PERSISTENT = {"stage3_param_persistence_threshold": 20000}
SWAPPED = {"fp32": ("fp32", {}), "persistent": ("bf16", PERSISTENT)}


def swap(engines: Engines, ema: WeightAverages) -> dict:
    """Evaluate the weights, the averages, and the weights again.

    Nothing is collected in between: that would partition parameters which a forward leaves gathered.
    """
    before = digest(engines)
    engines.train(False)
    live = engines.encode_decode(IMAGE_B3HW)
    with ema.applied():
        averaged = engines.encode_decode(IMAGE_B3HW)
    again = engines.encode_decode(IMAGE_B3HW)
    with ema.applied():
        inside = collect_weights(engines)
    after = digest(engines)
    averages = collect_averages(ema)
    return {
        "logits": averaged,
        "inside": all(torch.equal(inside[name], average.to(inside[name].dtype)) for name, average in averages.items()),
        "parameters": len(averages),
        "averaged_differs": not torch.equal(averaged, live),
        "logits_restored": torch.equal(again, live),
        "weights_restored": after == before,
    }


def check_swap() -> dict:
    """A run that evaluates its averages now and then, against one that evaluates its weights."""
    report = {}
    for kind in ("fp32", "persistent") if world() > 1 else ("persistent",):
        precision, zero = SWAPPED[kind]
        run = change_zero(make_run(precision, OUT / f"swap_{kind}_world{world()}"), **zero)
        engines, train_step = start(run)
        ema = WeightAverages(engines, SETTINGS["every_step"])
        train_with(train_step, ema, range(2))
        folder = save_checkpoint(engines, run, TrainingState(), ema)
        swapped = swap(engines, ema)
        train_with(train_step, ema, range(2, 4))
        other, train_other = start(run)
        train(train_other, range(4))
        swapped["same_run_without"] = digest(engines) == digest(other)
        logits = swapped.pop("logits")
        swapped["loaded_logits"] = torch.equal(load_for_evaluation(run, folder).encode_decode(IMAGE_B3HW), logits)
        torch.save(logits, OUT / f"swap_{kind}_world{world()}.pt")
        report[kind] = swapped
    return report


def load_for_evaluation(run: RunConfig, folder: Path) -> Engines:
    backbone, heads = build_modules(run)
    load_weights_from_checkpoint(folder, backbone, heads)
    engines = Engines(backbone, heads, run, training=False)
    engines.train(False)
    return engines


def check_interrupted_swap() -> dict:
    """An evaluation that fails also leaves the engines on their own weights."""
    engines, train_step = start(make_run("bf16"))
    ema = WeightAverages(engines, SETTINGS["every_step"])
    train_with(train_step, ema, range(2))
    before = digest(engines)
    try:
        with ema.applied():
            inside = digest(engines)
            raise ValueError
    except ValueError:
        return {"swapped": inside != before, "restored": digest(engines) == before}


TRAINED = {"trained": {}, "frozen": {"freeze_vit": True}, "part": {"freeze_vit": True, "unfreeze_pos_embed": True}}


def check_resume() -> dict:
    """Two steps, save, one more; against a fresh start that resumes and makes the same one."""
    report = {}
    for kind, options in TRAINED.items() if world() > 1 else [("trained", {})]:
        run = make_run("bf16", OUT / f"{kind}_world{world()}", **options)
        engines, train_step = start(run)
        ema = WeightAverages(engines, SETTINGS["every_step"])
        train_with(train_step, ema, range(2))
        folder = save_checkpoint(engines, run, TrainingState(step=2, scheduled_steps=2), ema)
        saved = collect_averages(ema)
        with ema.applied():
            torch.save(collect_weights(engines), OUT / f"{kind}_world{world()}_rank{distributed.rank()}.pt")
        train_with(train_step, ema, range(2, 3))
        again, train_again = start(run)
        ema_again = WeightAverages(again, SETTINGS["every_step"])
        train_again.scheduled_steps = resume_training(folder, again, run, ema_again).scheduled_steps
        loaded = collect_averages(ema_again)
        train_with(train_again, ema_again, range(2, 3))
        report[kind] = {
            "loaded": are_equal(saved, loaded),
            "averages": are_equal(collect_averages(ema), collect_averages(ema_again)),
            "end": digest(engines) == digest(again),
            "backbone_averages": len(ema.backbone),
            "head_averages": len(ema.heads),
        }
    return report


def are_equal(got: dict, wanted: dict) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def check_load_weights() -> dict:
    """Averages that two ranks wrote, as starting weights on any world size."""
    report = {}
    for kind, options in TRAINED.items():
        backbone, heads = build_modules(make_run("bf16", **options))
        loaded = load_weights_from_checkpoint(OUT / f"{kind}_world2" / "checkpoints" / "step_000002", backbone, heads)
        weights = collect_weights(Engines(backbone, heads, make_run("bf16", **options), training=False))
        report[kind] = {
            "averaged": loaded.averaged,
            "equal": are_equal(weights, torch.load(OUT / f"{kind}_world2_rank0.pt")),
        }
    return report


def check_refusals() -> dict:
    """Checkpoints that fit another run or are damaged, on the two ranks that wrote them."""
    run = make_run("bf16", OUT / "plain_world2")
    engines, _ = start(run)
    ema = WeightAverages(engines, SETTINGS["every_step"])
    plain = save_checkpoint(engines, run, TrainingState())
    with_averages = OUT / "trained_world2" / "checkpoints" / "step_000002"
    damaged = OUT / "damaged" / "step_000002"
    if distributed.is_main():
        shutil.copytree(with_averages, damaged)
        flip_byte(damaged / "ema" / "rank_00001.safetensors")
    distributed.barrier()
    part, _ = start(make_run("bf16", **TRAINED["part"]))
    before = digest(engines), collect_averages(ema)
    messages = {
        "without": catch(resume_training, plain, engines, run, ema),
        "with": catch(resume_training, with_averages, engines, run),
        "damaged": catch(resume_training, damaged, engines, run, ema),
        "loading_damaged": catch(load_weights_from_checkpoint, damaged, engines.backbone.module, engines.heads),
        "part": catch(resume_training, with_averages, part, run, WeightAverages(part, SETTINGS["every_step"])),
    }
    unmoved = digest(engines) == before[0] and are_equal(collect_averages(ema), before[1])
    return {**messages, "unmoved": unmoved}


def check_memory() -> dict:
    """Bytes that averages hold, for each value of this rank's shards, and what a swap adds while it lasts."""
    engines, train_step = start(make_run("bf16"))
    train(train_step, range(1))
    before = live_bytes()
    ema = WeightAverages(engines, SETTINGS["every_step"])
    held = live_bytes() - before
    train_with(train_step, ema, range(1, 3))
    after_steps = live_bytes() - before
    engines.backbone.empty_partition_cache()
    outside = live_bytes()
    with ema.applied():
        swapped = live_bytes() - outside
    shards = sum(p.ds_tensor.numel() for p in engines.backbone.module.parameters())
    heads = sum(p.numel() for p in engines.heads.parameters())
    return {
        "bytes_per_value": held / (shards + heads),
        "after_steps": after_steps / (shards + heads),
        "swap_bytes_per_head_value": swapped / heads,
        "shards": shards,
        "heads": heads,
        "all": sum(p.ds_numel for p in engines.backbone.module.parameters()),
    }


def check_secondary_shards() -> dict:
    """hpZ keeps copies of the shards. The last check: DeepSpeed takes that setting only once a process."""
    engines, train_step = start(change_zero(make_run("bf16"), zero_hpz_partition_size=2))
    ema = WeightAverages(engines, SETTINGS["every_step"])
    train_with(train_step, ema, range(2))
    swapped = swap(engines, ema)
    swapped["same_logits"] = torch.equal(swapped.pop("logits"), torch.load(OUT / f"swap_persistent_world{world()}.pt"))
    swapped["copies"] = sum(p.ds_secondary_tensor is not None for p in engines.backbone.module.parameters())
    return swapped


ONLY_TWO_RANKS = ("check_refusals", "check_memory", "check_interrupted_swap", "check_secondary_shards")


if __name__ == "__main__":
    run_checks(globals(), only_several_ranks=ONLY_TWO_RANKS)
