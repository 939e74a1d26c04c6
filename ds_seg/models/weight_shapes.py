"""The shape of a network, read from the shapes of its weights, and the shipped configs that have it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields

import ds_seg.openmmlab  # noqa: F401  (before mmcv)
from ds_seg.config.files import CONFIGS_ROOT
from ds_seg.models.internvit import InternViT
from ds_seg.models.positions import compute_grid_side

from mmcv import Config  # isort: skip
from mmseg.models.builder import BACKBONES  # isort: skip

Shapes = Mapping[str, tuple[int, ...]]
_QKV = "blocks.0.attn.qkv.weight"
_NEEDED = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight", _QKV)


@dataclass(frozen=True)
class BackboneShape:
    """What the weights of an InternViT tell of its arguments, by the arguments' names."""

    depth: int
    embed_dim: int
    mlp_ratio: float
    in_chans: int
    norm: str
    qkv_bias: bool
    qk_normalization: bool
    init_values: bool
    """Whether there is a LayerScale."""

    def find_differences(self, wanted: BackboneShape) -> list[str]:
        """Each argument in which this shape, a file's, differs from a config's, in words."""
        pairs = [(one.name, getattr(self, one.name), getattr(wanted, one.name)) for one in fields(self)]
        return [f"{name} is {got} in the file and {want} in the config" for name, got, want in pairs if got != want]


def measure_shape(shapes: Shapes) -> BackboneShape | None:
    """The shape of the network with these weights, under our names; None if they are no whole network."""
    if any(name not in shapes for name in _NEEDED):
        return None
    embed_dim, in_chans = shapes["patch_embed.proj.weight"][:2]
    return BackboneShape(
        depth=count_blocks(shapes),
        embed_dim=embed_dim,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / embed_dim,
        in_chans=in_chans,
        norm="layer" if "blocks.0.norm1.bias" in shapes else "rms",
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        qk_normalization="blocks.0.attn.q_norm.weight" in shapes,
        init_values="blocks.0.ls1.gamma" in shapes,
    )


def count_blocks(shapes: Shapes) -> int:
    """Number of different blocks among weights under our names."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def measure_image_px(shapes: Shapes) -> int | None:
    """Side in pixels of the image whose patch grid the position table has; None where that is no square."""
    side = compute_grid_side(shapes["pos_embed"][1]) if "pos_embed" in shapes else None
    return side * shapes["patch_embed.proj.weight"][-1] if side and "patch_embed.proj.weight" in shapes else None


def find_fitting_configs(shapes: Shapes) -> list[str]:
    """The files of `ds_configs/models` that have the network with these weights.

    Where one of them names the very image size of the position table as `pretrain_size`, only such files.

    Args:
        shapes: of weights under our names.

    Returns:
        Paths as a config of the project would write them, in alphabetical order.
    """
    wanted = measure_shape(shapes)
    image_px = measure_image_px(shapes)
    sizes = {name: size_px for name, (shape, size_px) in _read_shipped().items() if shape == wanted}
    return [name for name, size_px in sizes.items() if size_px == image_px] or list(sizes)


@functools.cache
def _read_shipped() -> dict[str, tuple[BackboneShape, int]]:
    """Shape and `pretrain_size` of every file in `ds_configs/models`."""
    shipped = {}
    for path in sorted((CONFIGS_ROOT / "models").glob("*.py")):
        backbone = dict(Config.fromfile(str(path)).model.backbone)
        if BACKBONES.get(backbone.pop("type")) is not InternViT:
            continue
        bound = inspect.signature(InternViT).bind(**backbone)
        bound.apply_defaults()
        arguments = {one.name: bound.arguments[one.name] for one in fields(BackboneShape)}
        arguments |= {"mlp_ratio": float(arguments["mlp_ratio"]), "init_values": bool(arguments["init_values"])}
        shipped[f"ds_configs/models/{path.name}"] = BackboneShape(**arguments), bound.arguments["pretrain_size"]
    return shipped
