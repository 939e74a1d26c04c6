"""InternViT: one vision transformer for InternViT-6B, InternViT-300M, DINOv2 and small models of their kind.

Parameter names are those of InternVL's segmentation backbone, so its checkpoints load as they are.

Source: OpenGVLab/InternVL segmentation/mmseg_custom/models/backbones/intern_vit_6b.py (arguments, names,
outputs). What differs: any image size that the patch divides, positions resized at every forward in FP32,
drop path drawn per sample and outside the blocks, attention through torch, weights loaded elsewhere.

Shape legend: B images, C image channels, H and W pixels, N tokens (class token first), D channels,
h and w the patch grid, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import ds_seg.openmmlab  # noqa: F401  (before mmcv)
from ds_seg.errors import ConfigError
from ds_seg.models.checkpointing import find_policy_faults, resolve_policy, run_block
from ds_seg.models.layers import Block, ChannelNorm, PatchEmbed, UpConv, build_norm, init_trunc_normal_
from ds_seg.models.positions import resize_position_table

from mmcv.runner import BaseModule  # isort: skip
from mmseg.models.builder import BACKBONES  # isort: skip


@BACKBONES.register_module(name=["InternViT", "InternViT6B"], force=True)
class InternViT(BaseModule):
    """A plain vision transformer that taps the patch tokens of chosen blocks.

    The defaults are InternViT-6B's. It may be built under `deepspeed.zero.Init`: every weight is
    initialised inside the constructor of the module that owns it.

    Args:
        in_chans: channels of an image.
        patch_size: side of a patch in pixels.
        img_size: side in pixels of the image whose patch grid the position table holds.
        pretrain_size: accepted for InternVL's configs and unused: the size that a checkpoint was trained
            at is read from the checkpoint.
        qkv_bias: whether the joint query, key, value projection has a bias.
        drop_path_rate: probability that the last block's branches are dropped, 0 <= rate < 1; it rises
            linearly from 0 at the first block.
        embed_dim: D.
        num_heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden channels of the MLP over D.
        init_values: first value of LayerScale; 0 or None for none.
        qk_normalization: RMSNorm on queries and keys.
        depth: L.
        use_flash_attn: accepted for InternVL's configs and unused: torch's scaled_dot_product_attention
            picks the fastest kernel that fits the device and dtype.
        with_cp: MMSegmentation's flag for `checkpointing`: True means `block`, False `none`.
        layerscale_no_force_fp32: multiply LayerScale in the dtype of the input (the default), not in FP32.
        layerscale_force_fp32: InternVL-MMDetSeg's name for the opposite.
        out_indices: the blocks to tap, ascending, counted from 0.
        freeze_vit: train nothing but the layers of `with_fpn`.
        unfreeze_pos_embed: train the position table in spite of `freeze_vit`.
        with_fpn: turn exactly four taps into maps of 4, 2, 1 and 1/2 times the patch grid.
        with_final_norm: LayerNorm at the end of each of those four.
        pretrained: accepted for InternVL's configs and unused: a run finds its weight file in the config, beside
            `load_from`.
        norm: `rms` (6B) or `layer` (300M, DINOv2).
        output_norm: DINOv2's final norm, applied to every tap.
        checkpointing: what the backward pass computes again instead of keeping it: `none`, `selective` (only
            norms, GELU, LayerScale and residuals), `block` (everything, the default), or `auto`, which
            `ds-seg train` replaces by the fastest of them that fits.

    Raises:
        ConfigError: arguments that contradict each other, all in one message.
    """

    def __init__(
        self,
        in_chans: int = 3,
        patch_size: int = 14,
        img_size: int = 224,
        pretrain_size: int = 224,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        embed_dim: int = 3200,
        num_heads: int = 25,
        mlp_ratio: float = 4.0,
        init_values: float | None = 0.1,
        qk_normalization: bool = True,
        depth: int = 48,
        use_flash_attn: bool | list[bool] = True,
        with_cp: bool | None = None,
        layerscale_no_force_fp32: bool | None = None,
        layerscale_force_fp32: bool | None = None,
        out_indices: Sequence[int] = (7, 11, 15, 23),
        freeze_vit: bool = False,
        unfreeze_pos_embed: bool = False,
        with_fpn: bool = False,
        with_final_norm: bool = False,
        pretrained: str | None = None,
        norm: str = "rms",
        output_norm: bool = False,
        checkpointing: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.in_chans, self.depth, self.patch_size, self.img_size = in_chans, depth, patch_size, img_size
        self.drop_path_rate, self.with_fpn = drop_path_rate, with_fpn
        self.out_indices = tuple(out_indices)
        self.out_channels = [embed_dim] * len(self.out_indices)
        self.checkpointing = resolve_policy(checkpointing, with_cp)
        self._validate(num_heads, norm, with_cp)
        in_fp32 = resolve_layerscale_fp32(layerscale_force_fp32, layerscale_no_force_fp32)

        self.patch_embed = PatchEmbed(in_chans, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        init_trunc_normal_(self.cls_token)
        init_trunc_normal_(self.pos_embed)
        shape = (embed_dim, num_heads, mlp_ratio, qkv_bias, qk_normalization, norm, init_values, in_fp32)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(depth))
        self.norm = build_norm(norm, embed_dim) if output_norm else nn.Identity()
        if freeze_vit:
            self.requires_grad_(False)
        if unfreeze_pos_embed:
            self.pos_embed.requires_grad_(True)
        if with_fpn:
            self.up1, self.up2, self.up3, self.up4 = build_pyramid(embed_dim, with_final_norm)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in; right also while its parameters are partitioned."""
        return self.patch_embed.proj.weight.dtype

    def is_trunk_trainable(self) -> bool:
        """Whether anything trains but the layers of `with_fpn`, so that the backward pass goes through the blocks."""
        names_and_parameters = self.named_parameters()
        return any(p.requires_grad for name, p in names_and_parameters if not name.startswith("up"))

    def forward(self, images_BCHW: Tensor, sample_seeds: Sequence[int] | None = None) -> list[Tensor]:
        """Compute the feature map of every tapped block.

        Args:
            images_BCHW: normalised images; H and W multiples of the patch; cast to the parameters' dtype.
            sample_seeds: one seed an image for drop path, so that what is dropped depends on the sample
                and not on how samples are spread over ranks. None: torch's default generator.

        Returns:
            One contiguous (B, D, h, w) map a tap, or the four scales of `with_fpn`.

        Raises:
            ConfigError: a height or width that is not a multiple of the patch.
        """
        grid_hw = self._compute_grid(images_BCHW)
        scales_L2B = self._draw_branch_scales(images_BCHW, sample_seeds)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trunk_trainable()):
            x_BND = self._embed(images_BCHW.to(self.dtype), grid_hw)
            taps = []
            for index, block in enumerate(self.blocks):
                scale_2B = None if scales_L2B is None else scales_L2B[index]
                x_BND = run_block(self.checkpointing, block, x_BND, scale_2B)
                if index in self.out_indices:
                    map_BDN = self.norm(x_BND)[:, 1:].transpose(1, 2)
                    taps.append(map_BDN.unflatten(2, grid_hw).contiguous())
                if index == self.out_indices[-1]:
                    break
        if not self.with_fpn:
            return taps
        ups = (self.up1, self.up2, self.up3, self.up4)
        return [up(tap_BDhw).contiguous() for up, tap_BDhw in zip(ups, taps, strict=True)]

    def _validate(self, num_heads: int, norm: str, with_cp: bool | None) -> None:
        faults = find_policy_faults(self.checkpointing, with_cp)
        if self.embed_dim % num_heads:
            faults.append(f"embed_dim {self.embed_dim} is not a multiple of num_heads {num_heads}")
        if self.img_size % self.patch_size:
            faults.append(f"img_size {self.img_size} px is not a multiple of patch_size {self.patch_size} px")
        if norm not in ("rms", "layer"):
            faults.append(f"norm is {norm!r}; use 'rms' (InternViT-6B) or 'layer' (InternViT-300M, DINOv2)")
        if not 0 <= self.drop_path_rate < 1:
            faults.append(f"drop_path_rate is {self.drop_path_rate}; it must lie in 0 <= rate < 1")
        taps = self.out_indices
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= self.depth:
            faults.append(
                f"out_indices is {list(taps)}; name at least one block of 0..{self.depth - 1}, "
                "each once, in rising order"
            )
        if self.with_fpn and len(taps) != 4:
            faults.append(f"with_fpn makes four scales of four taps, but out_indices names {len(taps)}")
        if faults:
            raise ConfigError("model.backbone (InternViT) can't be built: " + "; ".join(faults) + ".")

    def _compute_grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        height, width = images_BCHW.shape[-2:]
        patch = self.patch_size
        nearest = [max(round(side / patch), 1) * patch for side in (height, width)]
        if height % patch or width % patch or not height or not width:
            raise ConfigError(
                f"InternViT got images of {height} x {width} px, but both sides must be multiples of its patch of "
                f"{patch} px. Set the crop (training) and the window or size_divisor (evaluation) to multiples of "
                f"{patch}, for example {nearest[0]} x {nearest[1]}."
            )
        return height // patch, width // patch

    def _embed(self, images_BCHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        patches_BND = self.patch_embed(images_BCHW)
        cls_B1D = self.cls_token.expand(len(patches_BND), -1, -1)
        positions_1ND = resize_position_table(self.pos_embed, grid_hw)
        x_BND = torch.cat([cls_B1D.to(patches_BND.dtype), patches_BND], dim=1)
        return x_BND + positions_1ND.to(x_BND.dtype)

    def _draw_branch_scales(self, images_BCHW: Tensor, sample_seeds: Sequence[int] | None) -> Tensor | None:
        if not self.training or self.drop_path_rate == 0:
            return None
        scales_L2B = draw_branch_scales(self.drop_path_rate, self.depth, len(images_BCHW), sample_seeds)
        return scales_L2B.to(images_BCHW.device, non_blocking=True)


def draw_branch_scales(
    drop_path_rate: float, depth: int, batch: int, sample_seeds: Sequence[int] | None = None
) -> Tensor:
    """Draw what drop path leaves of every branch: 0 where it is dropped, else 1 / (probability to keep).

    Args:
        drop_path_rate: the last block's rate; block i of L has rate * i / (L - 1).
        depth: L.
        batch: B.
        sample_seeds: one seed a sample, or None for torch's default CPU generator.

    Returns:
        (L, 2, B) FP32 on the CPU: for each block the attention and the MLP branch of each sample.
    """
    keep_L11 = 1 - torch.linspace(0, drop_path_rate, depth)[:, None, None]
    if sample_seeds is None:
        draws_L2B = torch.rand(depth, 2, batch)
    else:
        assert len(sample_seeds) == batch, f"{len(sample_seeds)} drop-path seeds for {batch} images"
        generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds]
        draws_L2B = torch.stack([torch.rand(depth, 2, generator=g) for g in generators], dim=-1)
    return (draws_L2B < keep_L11).float() / keep_L11


def resolve_layerscale_fp32(force: bool | None, no_force: bool | None) -> bool:
    """Settle whether LayerScale multiplies in FP32, from the flag's two names; False if neither is given.

    Raises:
        ConfigError: they contradict each other.
    """
    if force is not None and force == no_force:
        raise ConfigError(
            f"model.backbone: layerscale_force_fp32 and layerscale_no_force_fp32 are both {force}, but each is the "
            "other's opposite. Leave one of them out."
        )
    return bool(force) if force is not None else no_force is False


def build_pyramid(channels: int, with_final_norm: bool) -> list[nn.Sequential]:
    """Build the four branches that turn maps of one scale into maps of 4, 2, 1 and 1/2 times that scale.

    Args:
        channels: D, in and out.
        with_final_norm: LayerNorm at the end of each branch.
    """

    def build_branch(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers, ChannelNorm(channels, eps=1e-6) if with_final_norm else nn.Identity())

    return [
        build_branch(UpConv(channels), ChannelNorm(channels, eps=1e-6), nn.GELU(), UpConv(channels)),
        build_branch(UpConv(channels)),
        build_branch(nn.Identity()),
        build_branch(nn.MaxPool2d(kernel_size=2, stride=2)),
    ]
