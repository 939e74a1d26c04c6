"""Checks of ds_seg.models that need two processes: run by torchrun, measures, and leaves the judging to pytest.

torchrun --standalone --nproc_per_node 2 tests/distributed/models_worker.py OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from checks import run_checks
from ds_seg import distributed
from ds_seg.errors import ConfigError, WeightsError
from ds_seg.models import FCNHead, InternViT, SyncBatchNorm, build_heads, load_backbone_weights
from ds_seg.models.checkpointing import POLICIES
from ds_seg.models.layers import Block

TINY = {
    "embed_dim": 32,
    "num_heads": 2,
    "depth": 2,
    "patch_size": 4,
    "img_size": 16,
    "out_indices": [0, 1],
    "init_values": 0.1,
}
SEEDS = [28, 29]  # of the 16 branches of four blocks these leave out 3, and in no block all of a branch
HOLD_NOTHING = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
SHARDED_CASES = {
    "prefetching": ({}, {"overlap_comm": True}, False),
    "holding_nothing": ({"norm": "layer", "qkv_bias": True, "qk_normalization": False}, HOLD_NOTHING, False),
    "partly_frozen": ({"freeze_vit": True, "unfreeze_pos_embed": True}, {}, False),
    "bf16": ({}, {"overlap_comm": True}, True),
}
OUT = Path(sys.argv[1])
RANK = distributed.rank()


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def zero_config(bf16: bool = False) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
    }


def build_partitioned(bf16: bool = False, **overrides) -> InternViT:
    with deepspeed.zero.Init(config_dict_or_path=zero_config(bf16)):
        return InternViT(**{**TINY, **overrides})


def save_plain(name: str, **overrides) -> tuple[InternViT, Path]:
    """The same random plain model on every rank, saved once."""
    torch.manual_seed(7)
    plain = InternViT(**{**TINY, **overrides})
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = OUT / name
    if distributed.is_main():
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in plain.state_dict().items()}}, path)
    distributed.barrier()
    return plain, path


def collect_full(model: nn.Module) -> dict[str, torch.Tensor]:
    full = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            full[name] = parameter.detach().clone()
    return full


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()


def compare_norms(make, shapes: list[tuple[int, ...]], momentum: float | None) -> dict[str, float]:
    """Distance of a norm run on two ranks from BatchNorm over everything in one process, over two steps."""
    torch.manual_seed(0)
    channels = shapes[0][1]
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    whole = nn.BatchNorm1d(channels, momentum=momentum)
    ours = make(channels, momentum=momentum)
    with torch.no_grad():
        for norm in (whole, ours):
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
    far = dict.fromkeys(("output", "input_grad", "weight_grad", "bias_grad", "running_mean", "running_var"), 0.0)
    for _ in range(2):
        inputs = [torch.randn(shape) * 3 + 5 for shape in shapes]
        factors = [torch.randn(shape) for shape in shapes]
        flat = [x.movedim(1, 0).reshape(1, channels, -1) for x in inputs]
        joined = torch.cat(flat, dim=2).requires_grad_()
        lengths = [x.shape[2] for x in flat]
        expected = whole(joined)
        (expected * torch.cat([f.movedim(1, 0).reshape(1, channels, -1) for f in factors], dim=2)).sum().backward()
        mine = inputs[RANK].clone().requires_grad_()
        got = ours(mine)
        (got * factors[RANK]).sum().backward()

        def here(tensor):
            return tensor.split(lengths, dim=2)[RANK]  # noqa: B023

        def flatten(tensor):
            return tensor.movedim(1, 0).reshape(1, channels, -1)

        step = {
            "output": difference(flatten(got), here(expected)),
            "input_grad": difference(flatten(mine.grad), here(joined.grad)),
            "weight_grad": difference(distributed.reduce_sum(ours.weight.grad.clone()), whole.weight.grad),
            "bias_grad": difference(distributed.reduce_sum(ours.bias.grad.clone()), whole.bias.grad),
            "running_mean": difference(ours.running_mean, whole.running_mean),
            "running_var": difference(ours.running_var, whole.running_var),
        }
        far = {key: max(far[key], value) for key, value in step.items()}
        for norm in (whole, ours):
            norm.zero_grad()
    ours.eval()
    whole.eval()
    sample = torch.randn(2, channels, 3, 3)
    far["eval"] = difference(ours(sample), whole(sample.flatten(2)).view_as(sample))
    assert int(ours.num_batches_tracked) == 2
    return far


def check_sync_batchnorm() -> dict:
    equal = [(2, 5, 4, 6), (2, 5, 4, 6)]
    unequal = [(3, 5, 4, 6), (1, 5, 7, 2)]
    return {
        "equal": compare_norms(SyncBatchNorm, equal, 0.1),
        "unequal": compare_norms(SyncBatchNorm, unequal, 0.1),
        "cumulative": compare_norms(SyncBatchNorm, unequal, None),
        "per_rank": compare_norms(nn.BatchNorm2d, equal, 0.1),
    }


def check_sync_batchnorm_corners() -> dict:
    norm = SyncBatchNorm(4, affine=False, track_running_stats=False)
    out = norm(torch.randn(2, 4, 3, dtype=torch.bfloat16) * 2 + 1)
    total = distributed.reduce_sum(out.float().sum((0, 2)))
    empty = SyncBatchNorm(2)
    try:
        empty(torch.randn(1 if RANK == 0 else 0, 2, 1))
        message = "no error"
    except ValueError as error:
        message = str(error)
    return {"dtype": str(out.dtype), "mean": float(total.abs().max()) / 12, "too_few": message}


def check_zero_init() -> dict:
    torch.manual_seed(100 + RANK)  # ranks disagree: DeepSpeed hands out rank 0's values
    model = build_partitioned(bf16=True, with_fpn=True, out_indices=[0, 1, 2, 3], depth=4)
    held = sum(p.numel() for p in model.parameters())
    full = collect_full(model)
    same = distributed.gather_objects({k: v.float().sum().item() for k, v in full.items()})
    drawn = [k for k in full if k in ("cls_token", "pos_embed") or k.endswith(("qkv.weight", "proj.weight"))]
    return {
        "all_partitioned": all(hasattr(p, "ds_id") for p in model.parameters()),
        "held_whole": held,
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "model_dtype": str(model.dtype),
        "same_on_ranks": same[0] == same[1],
        "std": {k: full[k].float().std().item() for k in drawn},
        "biases": max(full[k].abs().max().item() for k in full if k.endswith("bias")),
        "gamma": full["blocks.0.ls1.gamma"].float().unique().tolist(),
        "norm": full["blocks.0.norm1.weight"].float().unique().tolist(),
    }


def check_head_in_zero_init() -> dict:
    try:
        with deepspeed.zero.Init(config_dict_or_path=zero_config(bf16=True)):
            FCNHead(num_convs=0, in_channels=8, channels=8, num_classes=3, with_norm=True)
    except ConfigError as error:
        return {"message": str(error)}
    return {"message": "no error"}


def check_load_partitioned() -> dict:
    plain, path = save_plain("load.pth")
    model = build_partitioned()
    lines: list[str] = []
    report = load_backbone_weights(model, path if RANK == 0 else OUT / "nobody_reads_this.pth", log=lines.append)
    full = collect_full(model)
    logged = distributed.gather_objects(len(lines))
    return {
        "far": max(difference(full[k], v) for k, v in plain.state_dict().items()),
        "held_whole": sum(p.numel() for p in model.parameters()),
        "tensors": report.tensors,
        "logged": logged,
        "missing": report.missing,
    }


def check_load_resized() -> dict:
    plain, path = save_plain("resized.pth")
    model, other = build_partitioned(img_size=24), InternViT(**{**TINY, "img_size": 24})
    report = load_backbone_weights(model, path, log=lambda _: None)
    plain_report = load_backbone_weights(other, path, log=lambda _: None)
    return {
        "far": difference(collect_full(model)["pos_embed"], other.pos_embed),
        "changed": difference(other.pos_embed[:, 1:].mean(1), plain.pos_embed[:, 1:].mean(1)),
        "sides": report.resized_positions,
        "same_report": report == plain_report,
    }


def check_load_errors() -> dict:
    _, path = save_plain("deep.pth", depth=3)
    messages = {}
    for name, target in (("missing", OUT / "absent.pth"), ("other_model", path)):
        model = build_partitioned()
        try:
            load_backbone_weights(model, target, log=lambda _: None)
            message = "no error"
        except WeightsError as error:
            message = str(error)
        messages[name] = distributed.gather_objects(message)
    return messages


def run_plain(path: Path, images: torch.Tensor, factors: list[torch.Tensor], overrides: dict) -> tuple[list, dict]:
    """Features and gradients of the plain model, of the mean over ranks of the weighted features."""
    plain = InternViT(**{**TINY, **overrides, "checkpointing": "none"})
    load_backbone_weights(plain, path, log=lambda _: None)
    features = plain(images, sample_seeds=SEEDS)
    (sum((f * w).sum() for f, w in zip(features, factors, strict=True)) / len(SEEDS)).backward()
    return features, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def run_sharded(
    path: Path, images: torch.Tensor, factors: list[torch.Tensor], overrides: dict, policy: str, zero: dict, bf16: bool
) -> tuple[list, dict, int]:
    """The same of the sharded model in its second step, when DeepSpeed prefetches what it saw in the first."""
    config = zero_config(bf16)
    config["zero_optimization"].update(zero)
    model = build_partitioned(bf16, checkpointing=policy, **overrides)
    load_backbone_weights(model, path, log=lambda _: None)
    set_z3_leaf_modules(model, [Block])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        features = engine(images[RANK : RANK + 1], sample_seeds=SEEDS[RANK : RANK + 1])
        loss = sum((f.float() * w[RANK : RANK + 1]).sum() for f, w in zip(features, factors, strict=True))
        with MatrixProducts() as products:
            engine.backward(loss)
        gradients = {name: deepspeed.utils.safe_get_full_grad(p).clone() for name, p in trained.items()}
        engine.step()
    return features, gradients, products.count


def check_sharded_equals_plain() -> dict:
    """Every checkpointing policy, sharded, against the plain model, on a grid that needs interpolated positions."""
    report = {}
    for case, (overrides, zero, bf16) in SHARDED_CASES.items():
        overrides = {"drop_path_rate": 0.3, "depth": 4, "out_indices": [1, 3], **overrides}
        _, path = save_plain(f"{case}.pth", **overrides)
        torch.manual_seed(11)
        images, factors = torch.randn(2, 3, 24, 16), [torch.randn(2, 32, 6, 4) for _ in range(2)]
        expected, wanted = run_plain(path, images, factors, overrides)
        report[case], first = {}, None
        for policy in POLICIES:
            mine, got, products = run_sharded(path, images, factors, overrides, policy, zero, bf16)
            first = first or got
            report[case][policy] = {
                "features": max(difference(f, e[RANK : RANK + 1]) for f, e in zip(mine, expected, strict=True)),
                "gradients": max(difference(got[name], wanted[name]) / wanted[name].abs().max().item() for name in got),
                "from_none": max(difference(got[name], first[name]) for name in got),
                "scale": min(wanted[name].abs().max().item() for name in got),
                "trained": len(got),
                "matrix_products": products,
            }
    return report


def check_heads_under_ddp() -> dict:
    torch.manual_seed(RANK)
    head = {
        "type": "FCNHead",
        "in_channels": 8,
        "channels": 8,
        "num_convs": 0,
        "num_classes": 3,
        "with_norm": True,
        "dropout_ratio": 0.0,
    }
    heads = build_heads({"decode_head": head, "auxiliary_head": dict(head, with_norm=False, in_index=0)})
    ddp = DistributedDataParallel(heads)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1)
    for _ in range(2):
        features = [torch.randn(1 + RANK, 8, 4, 4, requires_grad=True) for _ in range(2)]
        entries = ddp(features, [], torch.randint(0, 3, (1 + RANK, 1, 8, 8)))
        sum(value for name, value in entries.items() if "loss" in name).backward()
        optimizer.step()
        optimizer.zero_grad()
    sums = {k: v.double().sum().item() for k, v in heads.state_dict().items()}
    gathered = distributed.gather_objects(sums)
    return {"identical": gathered[0] == gathered[1], "entries": sorted(entries)}


if __name__ == "__main__":
    run_checks(globals())
