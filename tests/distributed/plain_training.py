"""The recipe in plain PyTorch, one process and the whole micro-batch at once: what the two engines must equal.

Of ds_seg it uses only the vision transformer itself and the seeds of drop path. `MUTATIONS` are recipes with one
thing wrong each, which the comparison must tell apart.
"""

from __future__ import annotations

import torch
from engine_setup import (
    ACCUMULATION,
    AUX_WEIGHT,
    CLASSES,
    CLIP_NORM,
    DEPTH,
    DROP_PATH,
    GLOBAL_BATCH,
    IGNORED,
    LAYER_DECAY,
    LR,
    SIDE,
    STEPS,
    WARMUP_RATIO,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    WIDTH,
    make_micro_batch,
)
from torch import nn
from torch.nn import functional as F

from ds_seg.data.loader import MicroBatch
from ds_seg.engine.step import noise_seed
from ds_seg.models import InternViT

MUTATIONS = ("no_clipping", "clipping_per_engine", "norm_per_half_batch", "sum_over_micro_batches", "equal_rates")


class Head(nn.Module):
    """BatchNorm and a 1x1 classifier, named as FCNHead names them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.conv_seg = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, feature_BDhw: torch.Tensor, labels_B1HW: torch.Tensor, halves: int) -> torch.Tensor:
        normed_BDhw = torch.cat([self.norm(part) for part in feature_BDhw.chunk(halves)])
        logits_BKHW = F.interpolate(self.conv_seg(normed_BDhw), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return F.cross_entropy(logits_BKHW, labels_B1HW[:, 0], ignore_index=IGNORED, reduction="none").mean()


class Plain(nn.Module):
    """Backbone and heads under the parameter names that the engines use."""

    def __init__(self) -> None:
        super().__init__()
        taps = {"out_indices": [0, 1], "with_cp": False, "drop_path_rate": DROP_PATH}
        self.backbone = InternViT(embed_dim=WIDTH, depth=DEPTH, num_heads=2, img_size=SIDE, **taps)
        self.decode_head = Head()
        self.auxiliary_heads = nn.ModuleList([Head()])

    def forward(self, batch: MicroBatch, halves: int) -> torch.Tensor:
        seeds = [noise_seed(0, position) for position in batch.positions]
        early, late = self.backbone(batch.images_B3HW, sample_seeds=seeds)
        main = self.decode_head(late, batch.labels_B1HW, halves)
        return main + AUX_WEIGHT * self.auxiliary_heads[0](early, batch.labels_B1HW, halves)


def compute_layer_scale(name: str) -> float:
    parts = name.split(".")
    layer = DEPTH + 1
    if name.startswith(("backbone.patch_embed", "backbone.cls_token", "backbone.pos_embed")):
        layer = 0
    elif name.startswith("backbone.blocks"):
        layer = int(parts[2]) + 1
    return LAYER_DECAY ** (DEPTH + 1 - layer)


def compute_schedule(step: int) -> float:
    max_steps = 3 * STEPS // 2
    warm = 1 - (1 - step / WARMUP_STEPS) * (1 - WARMUP_RATIO) if step < WARMUP_STEPS else 1.0
    return warm * (1 - step / max_steps)


def build_optimizer(model: Plain, mutation: str | None) -> torch.optim.Optimizer:
    groups = []
    for name, parameter in model.named_parameters():
        scale = 1.0 if mutation == "equal_rates" else compute_layer_scale(name)
        exempt = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
        decay = 0.0 if exempt else WEIGHT_DECAY
        groups.append({"params": [parameter], "weight_decay": decay, "base_lr": LR * scale})
    return torch.optim.AdamW(groups, lr=LR)


def clip(model: Plain, mutation: str | None) -> float:
    parts = [model.parameters()]
    if mutation == "clipping_per_engine":
        parts = [model.backbone.parameters(), [*model.decode_head.parameters(), *model.auxiliary_heads.parameters()]]
    limit = float("inf") if mutation == "no_clipping" else CLIP_NORM
    return max(nn.utils.clip_grad_norm_(list(part), limit).item() for part in parts)


def train_plain(initial: dict[str, torch.Tensor], mutation: str | None = None) -> dict:
    """Train from `initial` and return losses and norms of all steps and the final weights."""
    model = Plain()
    model.load_state_dict(initial)
    model.train()
    optimizer = build_optimizer(model, mutation)
    halves = 2 if mutation == "norm_per_half_batch" else 1
    divisor = 1 if mutation == "sum_over_micro_batches" else ACCUMULATION
    size = GLOBAL_BATCH // ACCUMULATION
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * compute_schedule(step)
        total = 0.0
        for index in range(ACCUMULATION):
            first = (step * ACCUMULATION + index) * size
            loss = model(make_micro_batch(range(first, first + size)), halves)
            (loss / divisor).backward()
            total += loss.item() / ACCUMULATION
        norms.append(clip(model, mutation))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}
