"""Our InternViT against the independent code of transformers: its InternVL vision model and its DINOv2 model.

transformers computes attention by its eager formula here, and both get the same weights through a file, so only the
mathematics is shared. Random weights are large enough to matter everywhere; DINOv2-S/14 is also compared with real
ones. Compared are the features of every block and the gradients of all parameters and of the image, on the table's own
grid and on larger, smaller and elongated ones. A measure is the largest difference over the largest value of the same
tensor, the worst over all tensors and sizes.

Where they differ, as measured here:

- FP32: in rounding alone (in FP64 they agree to 1e-15), 4e-7 in features and 2e-6 in gradients. With real DINOv2-S
  weights 3e-6 and, depending on the size, 1e-5 to 4e-5; the latter in norm weights of the first blocks, sums in which
  almost everything cancels. It is the rounding of torch's fused attention: transformers with that attention has our
  features bit for bit, and gradients as far from FP64 as ours (3e-5).
- bf16: transformers' RMSNorm rounds before it multiplies by the weight, torch's fused norm after; its InternVL
  interpolates positions in bf16, its DINOv2 and ours in FP32. Neither is nearer to FP32: distances within 0.4%.
- RMSNorm in FP64: theirs computes in FP32 inside, so there only the LayerNorm networks are compared.
- Facebook's own DINOv2 code interpolates by a factor of (side + 0.1) / table and not by size, which samples at other
  places: 6e-2 of the largest value for random weights. transformers and ours both interpolate by size.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_seg.models import InternViT, internvit, layers, load_backbone_weights
from ds_seg.models.positions import compute_grid_side, resize_position_table
from ds_seg.models.weight_dialects import translate_names
from pretrained import find_dinov2_small

transformers = pytest.importorskip("transformers")
from transformers.models.internvl.modeling_internvl import InternVLVisionModel  # noqa: E402

TABLE, ELONGATED = (16, 16), (24, 40)
SIZES = [TABLE, (32, 32), (8, 8), ELONGATED, (8, 32)]  # the last has as many patches as the table, in another shape
REAL_SIZES = [(154, 154), (196, 280), (560, 70)]
FEATURES, GRADIENTS, IN_FP64 = 3e-6, 1e-5, 1e-12
REAL_FEATURES, REAL_GRADIENTS = 2e-5, 1e-4
SHAPE = {"embed_dim": 32, "num_heads": 4, "depth": 3, "patch_size": 4, "img_size": 16, "out_indices": [0, 1, 2]}
SMALL = {"embed_dim": 384, "num_heads": 6, "depth": 12, "img_size": 518, "init_values": 1.0, "checkpointing": "none"}
LAYER_NORM = {"norm": "layer", "qkv_bias": True, "qk_normalization": False}
KINDS = {"InternVL rms": {}, "InternVL layer": LAYER_NORM, "DINOv2": {**LAYER_NORM, "output_norm": True}}


@dataclass
class Pair:
    """The same network twice, with the same weights."""

    ours: InternViT
    theirs: nn.Module

    def compare(self, images: Tensor) -> tuple[float, float]:
        """Relative differences of features and of gradients, the worst over all tensors."""
        features, gradients = self._run(self.ours, self.ours, images)
        wanted_features, wanted_gradients = self._run(self.theirs, self._tap_theirs, images)
        assert gradients.keys() == wanted_gradients.keys() == {"image", *dict(self.ours.named_parameters())}
        of_features = max(map(relative_difference, features, wanted_features))
        return of_features, max(relative_difference(gradients[n], wanted_gradients[n]) for n in gradients)

    def compare_sizes(self, sizes: list[tuple[int, int]], batch: int) -> tuple[float, float]:
        """The same, the worst over image sizes."""
        found = [self.compare(draw_images(batch, size)) for size in sizes]
        return max(features for features, _ in found), max(gradients for _, gradients in found)

    def _run(
        self, model: nn.Module, tap: Callable[[Tensor], list[Tensor]], images: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        images = images.clone().requires_grad_()
        features = tap(images)
        torch.manual_seed(2)
        model.zero_grad()
        sum((feature * torch.randn(feature.shape)).sum() for feature in features).backward()
        named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        sources = translate_names(named).sources
        joined = {name: torch.cat([named[part] for part in parts]) for name, parts in sources.items()}
        return features, {"image": images.grad, **joined}

    def _tap_theirs(self, images: Tensor) -> list[Tensor]:
        grid = [side // self.ours.patch_size for side in images.shape[2:]]
        states = self.theirs(pixel_values=images, output_hidden_states=True).hidden_states[1:]
        states = [self.theirs.layernorm(s) if isinstance(self.theirs, transformers.Dinov2Model) else s for s in states]
        return [state[:, 1:].transpose(1, 2).unflatten(2, grid) for state in states]


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def draw_images(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def build_theirs(kind: str) -> nn.Module:
    """transformers' network with random weights that all matter: it starts from zeros and ones."""
    torch.manual_seed(3)
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "attn_implementation": "eager"}
    if kind == "DINOv2":
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(patch_size=4, image_size=16, **common))
    else:
        rms = kind == "InternVL rms"
        config = transformers.InternVLVisionConfig(
            patch_size=[4, 4],
            image_size=[16, 16],
            intermediate_size=128,
            norm_type="rms_norm" if rms else "layer_norm",
            use_qk_norm=rms,
            attention_bias=not rms,
            **common,
        )
        theirs = InternVLVisionModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return theirs.eval()


def build_ours(path: Path, **arguments: object) -> InternViT:
    ours = InternViT(**arguments).eval()
    load_backbone_weights(ours, path, log=lambda _: None)
    return ours


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    """Every kind of network with random weights."""
    built = {}
    for kind, arguments in KINDS.items():
        theirs, folder = build_theirs(kind), tmp_path_factory.mktemp("weights")
        theirs.save_pretrained(folder)
        built[kind] = Pair(build_ours(folder / "model.safetensors", **{**SHAPE, **arguments}), theirs)
    return built


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_of_random_weights(pairs, kind, claim):
    features, gradients = pairs[kind].compare_sizes(SIZES, batch=2)
    against = f"transformers' {kind} model"
    claim("Features of every block, 5 image sizes", measured=features, tolerance=FEATURES, against=against)
    claim("Gradients of parameters and image, 5 sizes", measured=gradients, tolerance=GRADIENTS, against=against)


@pytest.mark.parametrize("kind", ["InternVL layer", "DINOv2"])
def test_the_formulas_are_the_same(pairs, kind, claim):
    """In FP64, on the table's own grid, as positions are interpolated in FP32 whatever the rest is."""
    pair = deepcopy(pairs[kind])
    pair.ours.double()
    pair.theirs.double()
    measured = max(pair.compare(draw_images(2, TABLE).double()))
    claim("Features and gradients in FP64", measured=measured, tolerance=IN_FP64, against=f"transformers' {kind} model")


def test_features_and_gradients_of_real_dinov2_small(pytestconfig, tmp_path, claim):
    path = find_dinov2_small(pytestconfig)
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(path)
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = build_ours(path, **{**KINDS["DINOv2"], **SMALL, "out_indices": list(range(12))})
    features, gradients = Pair(ours, theirs).compare_sizes(REAL_SIZES, batch=1)
    against = "transformers' DINOv2-S/14, real weights"
    claim("Features of every block, 3 image sizes", measured=features, tolerance=REAL_FEATURES, against=against)
    claim("Gradients of parameters and image, 3 sizes", measured=gradients, tolerance=REAL_GRADIENTS, against=against)


def interpolate(table: Tensor, dtype: torch.dtype = torch.float32, **arguments: object) -> Tensor:
    """The table on another grid, by whatever arguments."""
    side = compute_grid_side(table.shape[1])
    grid = table[:, 1:].to(dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, **{"mode": "bicubic", **arguments})
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def by_facebooks_factor(table: Tensor, grid: tuple[int, int]) -> Tensor:
    side = compute_grid_side(table.shape[1])
    return interpolate(table, scale_factor=tuple((wanted + 0.1) / side for wanted in grid))


def drop_class_position(table: Tensor, grid: tuple[int, int]) -> Tensor:
    resized = resize_position_table(table, grid)
    return torch.cat([resized[:, :1] * 0, resized[:, 1:]], dim=1)


def detach_patch_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    resized = resize_position_table(table, grid)
    return torch.cat([resized[:, :1], resized[:, 1:].detach()], dim=1)


def tanh_mlp(mlp: layers.Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))


POSITIONS = (internvit, "resize_position_table")
MUTATIONS = {
    "Class token's position dropped": (*POSITIONS, drop_class_position),
    "Positions interpolated in bf16": (*POSITIONS, lambda t, grid: interpolate(t, torch.bfloat16, size=grid)),
    "Positions interpolated bilinearly": (*POSITIONS, lambda t, grid: interpolate(t, size=grid, mode="bilinear")),
    "Positions interpolated by Facebook's factor": (*POSITIONS, by_facebooks_factor),
    "Height and width of the grid swapped": (*POSITIONS, lambda t, grid: resize_position_table(t, grid[::-1])),
    "No gradient to patch positions": (*POSITIONS, detach_patch_positions),
    "LayerScale left out": (layers.LayerScale, "forward", lambda scale, x: x),
    "RMSNorm without its weight": (nn.RMSNorm, "forward", lambda norm, x: F.rms_norm(x, norm.normalized_shape)),
    "GELU by tanh": (layers.Mlp, "forward", tanh_mlp),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_backbone_mutations(pairs, mutation, monkeypatch, caught):
    monkeypatch.setattr(*MUTATIONS[mutation])
    features, gradients = pairs["InternVL rms"].compare(draw_images(2, ELONGATED))
    by_tolerance = {features / FEATURES: (features, FEATURES), gradients / GRADIENTS: (gradients, GRADIENTS)}
    measured, tolerance = by_tolerance[max(by_tolerance)]
    caught(mutation, by=test_features_and_gradients_of_random_weights.__name__, measured=measured, tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_ours_is_as_near_to_fp32_as_theirs(pairs, kind, claim):
    """Root mean square distance of the last block's features from those in FP32, from the same rounded weights."""
    pair, images = deepcopy(pairs[kind]), draw_images(8, ELONGATED)
    narrow = [pair.ours.bfloat16()(images)[-1], pair.theirs.bfloat16() and pair._tap_theirs(images.bfloat16())[-1]]
    pair.ours.float()
    wanted = pair.ours(images)[-1]
    ours, theirs = ((got - wanted).square().mean().sqrt().item() for got in narrow)
    against = f"transformers' {kind} model"
    claim("Distance of bf16 from FP32, ours over theirs", measured=ours / theirs, tolerance=1.05, against=against)
