"""One rank of test_weights_distributed.py: weight files into shards and replicated heads, and what that takes.

Usage: weights_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from command_line import TINY as TINY_CONFIG
from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, save_checkpoint
from ds_seg.commands import add_commands
from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config
from ds_seg.data.demo_scenes import write_demo_dataset
from ds_seg.data.opening import open_datasets
from ds_seg.engine.engines import build_modules
from ds_seg.errors import WeightsError
from ds_seg.models import InternViT, build_heads, load_backbone_weights
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.weight_segmentor import load_segmentor_weights
from ds_seg.session import Evaluator, build_engines, load_weights
from recipe import SIDE_PX, Recipe
from sharded import build_run

sys.path.insert(0, str(CONFIGS_ROOT.parent / "benchmarks"))
import load_weights as benchmark

OUT = Path(sys.argv[1])
RANK = distributed.rank()
TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16, "out_indices": [0, 1]}
HEAD = {"type": "FCNHead", "in_channels": 32, "channels": 32, "num_convs": 0, "num_classes": 5, "with_norm": True}
ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
SIZES = argparse.Namespace(width=384, depth=12, shard_mib=6, methods=["streamed", "whole"], folder=OUT / "memory")


def randomise(module, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return module


def on_rank_0(write) -> None:
    if distributed.is_main():
        write()
    distributed.barrier()


def build_partitioned(**overrides) -> InternViT:
    with deepspeed.zero.Init(config_dict_or_path=ZERO):
        return InternViT(**{**TINY, **overrides})


@torch.no_grad()
def far_from(plain, partitioned) -> float:
    far = 0.0
    for (name, parameter), wanted in zip(partitioned.named_parameters(), plain.state_dict().values(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.shape == wanted.shape, name
            far = max(far, (parameter.data - wanted).abs().max().item())
    return far


def check_memory() -> dict:
    SIZES.folder.mkdir(exist_ok=True)
    on_rank_0(lambda: benchmark.write_checkpoint(SIZES.folder, SIZES))
    return {"rows": benchmark.measure_rank(SIZES), "bound": benchmark.measure_bound(SIZES.folder, SIZES)}


def check_projections_torn_between_files() -> dict:
    """Query, key and value of each block in files of their own, in transformers' spelling."""
    plain, folder = randomise(InternViT(**TINY), 3), OUT / "torn"
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token"}
    names |= {"pos_embed": "embeddings.position_embeddings", "blocks.": "encoder.layer.", "norm1": "layernorm_before"}
    names |= {"norm2": "layernorm_after", "ls1.gamma": "lambda_1", "ls2.gamma": "lambda_2"}
    names |= {"attn.proj": "attention.projection_layer", "attn.": "attention."}
    shards: list[dict] = [{}, {}, {}]
    for number, (name, value) in enumerate(plain.state_dict().items()):
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "qkv" in name:
            for part, rows in enumerate(value.chunk(3)):
                shards[part][f"model.vision_tower.{name.replace('qkv', 'qkv'[part] + '_proj')}"] = rows.contiguous()
        else:
            shards[number % 3][f"model.vision_tower.{name}"] = value

    def write() -> None:
        folder.mkdir()
        for number, shard in enumerate(shards):
            save_file(shard, folder / f"{number}.safetensors")
        weight_map = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    on_rank_0(write)
    partitioned = build_partitioned()
    report = load_backbone_weights(partitioned, folder, log=lambda _: None)
    return {"far": far_from(plain, partitioned), "dialect": report.dialect, "tensors": report.tensors}


def check_patches_resized() -> dict:
    source, path = randomise(InternViT(**TINY), 4), OUT / "patches.pth"
    on_rank_0(lambda: torch.save(source.state_dict(), path))
    plain, partitioned = InternViT(**{**TINY, "patch_size": 2}), build_partitioned(patch_size=2)
    reports = [load_backbone_weights(model, path, log=lambda _: None) for model in (plain, partitioned)]
    return {"far": far_from(plain, partitioned), "sides": reports[1].resized_patch, "same": reports[0] == reports[1]}


def check_segmentor() -> dict:
    """Rank 1 names a file that does not exist: it must not read."""
    model = {"decode_head": HEAD, "auxiliary_head": {**HEAD, "in_index": 0}}
    source = randomise(InternViT(**TINY), 5), randomise(build_heads(model), 6)
    state = {f"backbone.{name}": value for name, value in source[0].state_dict().items()}
    state |= {name.replace("heads.0.", "head."): value for name, value in source[1].state_dict().items()}
    on_rank_0(lambda: torch.save({"state_dict": state}, OUT / "segmentor.pth"))
    path = OUT / ("segmentor.pth" if RANK == 0 else "absent.pth")
    target = build_partitioned(), randomise(build_heads(model), 100 + RANK)
    lines: list[str] = []
    load_segmentor_weights(*target, path, trunk_path=None, needs_head=True, log=lines.append)
    heads = zip(target[1].state_dict().values(), source[1].state_dict().values(), strict=True)
    other = build_heads({"decode_head": {**HEAD, "num_classes": 3}})
    try:
        load_segmentor_weights(build_partitioned(), other, path, trunk_path=None, needs_head=True, log=lines.append)
        message = "no error"
    except WeightsError as error:
        message = str(error)
    return {
        "far": far_from(source[0], target[0]),
        "heads_equal": all(torch.equal(got, wanted) for got, wanted in heads),
        "logged": len(lines),
        "message": message,
    }


def far_from_masters(engines, wanted: dict) -> float:
    """Of the masters, whole, from FP32 values; the weights must be the rounding of these."""
    far = 0.0
    for name, parameter in engines.backbone.module.named_parameters():
        far = max(far, (safe_get_full_fp32_param(parameter) - wanted[name].float()).abs().max().item())
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter.data, wanted[name].bfloat16()), name
    return far


def check_masters() -> dict:
    """A bf16 backbone starts from files of more bits, of which rank 1 sees none, and from a checkpoint."""
    report = {}
    recipe = Recipe(bf16=True, layer_decay=0.9)
    run = build_run(recipe, 2, OUT / "masters")
    source = randomise(build_backbone(run.model), 7).state_dict()
    resized = build_run(recipe, 2, img_size=2 * SIDE_PX)
    larger = build_backbone(resized.model)
    for dtype in (torch.float16, torch.float32):
        values = {name: value.to(dtype) for name, value in source.items()}
        path = OUT / f"{dtype}.pth"
        on_rank_0(lambda values=values, path=path: torch.save(values, path))
        for part in (0.0, 0.5, 1.0):
            other = build_run(recipe.replace(offloaded=part), 2)
            lines: list[str] = []
            engines = build_engines(other, training=True, weights=str(path), log=lines.append)
            report[f"{dtype}, {part} offloaded"] = far_from_masters(engines, values)
    load_backbone_weights(larger, path, log=lambda _: None)
    engines = build_engines(resized, training=True, weights=str(path), log=lambda _: None)
    report["resized"] = far_from_masters(engines, larger.state_dict())
    engines = build_engines(run, training=True, weights=str(path), log=lambda _: None)
    folder = save_checkpoint(engines, run, TrainingState(step=1))
    engines = build_engines(run, training=True, weights=str(folder), log=lambda _: None)
    report["checkpoint"] = far_from_masters(engines, source)
    return report


def check_frozen_are_read_once() -> list:
    """Parameters that a second reading gives, of a weight file and of a checkpoint."""
    part = build_run(Recipe(bf16=True), 2, freeze_vit=True, unfreeze_pos_embed=True)
    read = []
    for weights in (OUT / "torch.float32.pth", OUT / "masters"):
        modules = build_modules(part)
        exact = load_weights(part, *modules, str(weights), training=True, log=lambda _: None)
        read.append([stretch.target for stretch in exact])
    return read


def run_command(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser)
    args = parser.parse_args([str(argument) for argument in argv])
    assert args.run(args) == 0


def write_release(path: Path, engines, dataset, parts: tuple[str, ...]) -> None:
    """A checkpoint as MMSegmentation releases it, of some parts of a model."""
    state = {name.replace("heads.0.", "head."): value for name, value in engines.heads.state_dict().items()}
    for name, parameter in engines.backbone.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[f"backbone.{name}"] = parameter.detach().clone()
    kept = {name: value for name, value in state.items() if name.startswith(parts)}
    on_rank_0(lambda: torch.save({"meta": {"CLASSES": dataset.CLASSES}, "state_dict": kept}, path))


def check_commands() -> dict:
    """A released file scores what its engines do, predicts, and is a start; its head alone too, beside its trunk."""
    os.environ["DS_SEG_DEMO_ROOT"] = str(OUT / "data")
    on_rank_0(lambda: write_demo_dataset(OUT / "data", train_images=8, val_images=4, size_px=112))
    config = OUT / "tiny.py"
    on_rank_0(lambda: config.write_text(TINY_CONFIG.format(base=str(CONFIGS_ROOT / "runs" / "demo.py"))))
    run = build_run_config(RunOptions(str(config)), distributed.world_size())
    (dataset,) = open_datasets(run, "test")
    engines = build_engines(run, training=False, weights=None, log=lambda _: None)
    torch.manual_seed(9)
    torch.nn.init.normal_(engines.heads.decode_head.conv_seg.weight)  # so that more than one class is predicted
    files = {"whole": OUT / "whole.pth", "head": OUT / "head.pth", "trunk": OUT / "trunk.pth"}
    for name, parts in {"whole": ("backbone.", "decode_head."), "head": ("decode_head.",), "trunk": ("back",)}.items():
        write_release(files[name], engines, dataset, parts)
    scores = {"engines": Evaluator(run, dataset)(engines).metrics()}
    trunk = ["--cfg-options", f"load_from={files['trunk']}"]
    for name, options in {"whole": [], "head": trunk}.items():
        run_command("evaluate", config, files[name], "--out", OUT / f"{name}.json", *options)
        distributed.barrier()
        scores[name] = json.loads((OUT / f"{name}.json").read_text())
    run_command("predict", config, files["whole"], OUT / "data/images/validation", "--out", OUT / "predicted")
    lines: list[str] = []
    smaller = build_run_config(RunOptions(str(config), cfg_options={"model.backbone.img_size": 28}), 2)
    build_engines(smaller, training=False, weights=str(files["whole"]), log=lines.append)
    started = build_engines(run, training=True, weights=str(files["whole"]), log=lambda _: None)
    states = zip(started.heads.state_dict().values(), engines.heads.state_dict().values(), strict=True)
    return {
        "scores": scores,
        "warnings": [line for line in lines if line.startswith("warning")],
        "predicted": len(list((OUT / "predicted" / "masks").iterdir())),
        "start_has_the_head": all(torch.equal(got, wanted) for got, wanted in states),
    }


def main() -> None:
    distributed.initialize()
    with mock.patch.dict(os.environ):
        checks = {name: check for name, check in globals().items() if name.startswith("check_")}
        gathered = distributed.gather_objects({name: check() for name, check in checks.items()})
    if distributed.is_main():
        (OUT / "results.json").write_text(json.dumps(gathered))
    distributed.shutdown()


if __name__ == "__main__":
    main()
