"""InternViT and its linear heads once more, in plain PyTorch: the model of the reference trainer.

Written from the description of the model, under the parameter names of the real ones so that weights pass between
the two. It shares no code with ds_seg.

Shape legend: B images, N tokens (class token first), D channels, H W pixels, h w patches, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ds_seg.data.training_batches import MicroBatch
from recipe import CLASSES, DEPTH, HEADS, IGNORED_LABEL, SIDE_PX, WIDTH, Recipe

PATCH_PX = 14
SEED = 0


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        wide = x_BND.to(torch.promote_types(x_BND.dtype, torch.float32))
        normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return self.weight * normed.to(x_BND.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_norm, self.k_norm = RmsNorm(), RmsNorm()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x_BND).split(WIDTH, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return self.gamma * x_BND


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(), RmsNorm()
        self.attn, self.mlp = Attention(), Mlp()
        self.ls1, self.ls2 = LayerScale(), LayerScale()

    def forward(self, x_BND: torch.Tensor, kept_2B11: torch.Tensor) -> torch.Tensor:
        x_BND = x_BND + kept_2B11[0] * self.ls1(self.attn(self.norm1(x_BND)))
        return x_BND + kept_2B11[1] * self.ls2(self.mlp(self.norm2(x_BND)))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH_PX, stride=PATCH_PX)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIDE_PX // PATCH_PX) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, images_B3HW: torch.Tensor, kept_L2B: torch.Tensor) -> list[torch.Tensor]:
        patches_BDhw = self.patch_embed["proj"](images_B3HW)
        tokens_BND = patches_BDhw.flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(tokens_BND), -1, -1), tokens_BND], dim=1) + self.pos_embed
        maps = []
        for block, kept_2B in zip(self.blocks, kept_L2B, strict=True):
            x_BND = block(x_BND, kept_2B[..., None, None].to(x_BND.dtype))
            maps.append(x_BND[:, 1:].transpose(1, 2).reshape(patches_BDhw.shape))
        return maps


class LinearHead(nn.Module):
    def __init__(self, class_weights: tuple[float, ...] | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.conv_seg = nn.Conv2d(WIDTH, CLASSES, 1)
        weights = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, map_BDhw: torch.Tensor, labels_B1HW: torch.Tensor) -> torch.Tensor:
        logits_BKhw = self.conv_seg(self.norm(map_BDhw.to(self.conv_seg.weight.dtype)))
        logits_BKHW = F.interpolate(logits_BKhw, size=(SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False)
        labels_BHW = labels_B1HW[:, 0]
        kind = {"weight": self.class_weights, "ignore_index": IGNORED_LABEL, "reduction": "none"}
        return F.cross_entropy(logits_BKHW, labels_BHW, **kind).mean()


class PlainModel(nn.Module):
    """Backbone, head and, where the recipe has one, auxiliary head; gives the loss of a micro-batch."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = Backbone()
        self.decode_head = LinearHead(recipe.class_weights)
        self.auxiliary_heads = nn.ModuleList([LinearHead(None)] if recipe.auxiliary_weight else [])

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        kept_L2B = draw_kept_branches(self.recipe.drop_path, batch.positions)
        dtype = self.backbone.cls_token.dtype
        early, late = self.backbone(batch.images_B3HW.to(dtype), kept_L2B)
        loss = self.decode_head(late, batch.labels_B1HW)
        for head in self.auxiliary_heads:
            loss = loss + self.recipe.auxiliary_weight * head(early, batch.labels_B1HW)
        return loss


def draw_kept_branches(drop_path: float, positions: list[int]) -> torch.Tensor:
    """(L, 2, B): 0 where a sample's branch is left out, else 1 / (probability that it is kept).

    As promised to users (docs/decisions/001): a sample's noise comes from the run's seed and its position alone.
    """
    kept_L = [1 - drop_path * i / (DEPTH - 1) for i in range(DEPTH)]
    samples = []
    for position in positions:
        seed = int(np.random.SeedSequence((SEED, position)).generate_state(1, np.uint64)[0]) >> 1
        draws_L2 = torch.rand(DEPTH, 2, generator=torch.Generator().manual_seed(seed))
        samples.append(torch.stack([(draws_2 < kept).float() / kept for draws_2, kept in zip(draws_L2, kept_L)]))  # noqa: B905
    return torch.stack(samples, dim=-1)
