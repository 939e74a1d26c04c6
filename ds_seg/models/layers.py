"""Building blocks of the vision transformer, each of which initialises its weights in its own constructor.

Under `deepspeed.zero.Init` a module's parameters are partitioned the moment its `__init__` ends, so a
later initialisation pass would touch empty shards.

Shape legend: B images, N tokens (class token first), D channels, H heads, E channels of one head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
NORM_EPS = 1e-6


def init_trunc_normal_(tensor: Tensor) -> None:
    """Fill a tensor, in place, from a normal of std 0.02 cut off at two standard deviations.

    The cut is explicit because torch's default of +-2 is absolute: 100 standard deviations away.
    """
    nn.init.trunc_normal_(tensor, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)


class Linear(nn.Linear):
    """torch's Linear with the transformer's initial values."""

    def reset_parameters(self) -> None:
        """Draw the weight from a truncated normal and zero the bias."""
        init_trunc_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Project the last dimension, as one matrix product that adds the bias itself.

        With more than two dimensions DeepSpeed's stand-in for torch's linear adds the bias in a second pass and in
        place: slower, and under selective checkpointing added again to the product that was kept.

        Args:
            x: (..., channels in), any float dtype.

        Returns:
            (..., channels out).
        """
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class PatchProjection(nn.Conv2d):
    """torch's Conv2d with the transformer's initial values."""

    def reset_parameters(self) -> None:
        """Draw the weight from a truncated normal and zero the bias."""
        init_trunc_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class UpConv(nn.ConvTranspose2d):
    """A 2x transposed convolution, initialised for the variance of what it puts out."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=2, stride=2)

    def reset_parameters(self) -> None:
        """Draw the weight from a normal of variance 2 / fan-out and zero the bias."""
        fan_out = self.kernel_size[0] * self.kernel_size[1] * self.out_channels
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map in (B, D, height, width) layout."""

    def forward(self, x_BDhw: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalise every position over its channels.

        Args:
            x_BDhw: (B, D, height, width), any float dtype; the statistics are FP32.

        Returns:
            The same shape and dtype.
        """
        return super().forward(x_BDhw.movedim(1, -1)).movedim(-1, 1)


def build_norm(kind: str, channels: int) -> nn.Module:
    """Build the norm of a transformer block.

    torch's fused norms compute in FP32 inside whatever the input is. The InternVL formula rounds to the
    input's dtype before it multiplies with the weight, the fused kernels after: one ulp apart in bf16.

    Args:
        kind: `rms` (InternViT-6B) or `layer` (InternViT-300M, DINOv2).
        channels: D.
    """
    return (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(channels, eps=NORM_EPS)


class LayerScale(nn.Module):
    """A learned factor per channel on the output of a residual branch.

    Args:
        channels: D.
        initial: the value every factor starts from.
        in_fp32: multiply in FP32 and cast back, also where the parameter or the input is narrower.
    """

    def __init__(self, channels: int, initial: float, in_fp32: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))
        self.in_fp32 = in_fp32

    def forward(self, x_BND: Tensor) -> Tensor:
        """Scale every channel.

        Args:
            x_BND: (B, N, D), any float dtype.

        Returns:
            The same shape and dtype.
        """
        if self.in_fp32:
            return (x_BND.float() * self.gamma.float()).to(x_BND.dtype)
        return x_BND * self.gamma


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token.

    Args:
        in_chans: channels of the image.
        patch_size: side of a patch in pixels.
        embed_dim: D.
    """

    def __init__(self, in_chans: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Project patches to tokens, row by row.

        Args:
            images_BCHW: images in the dtype of the parameters.

        Returns:
            (B, height/patch * width/patch, D).
        """
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernel, optionally with normalised queries and keys.

    Args:
        channels: D.
        num_heads: H.
        qkv_bias: whether the joint projection has a bias.
        qk_normalization: RMSNorm over all D channels of the queries and of the keys.
    """

    def __init__(self, channels: int, num_heads: int, qkv_bias: bool, qk_normalization: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)
        self.q_norm = build_norm("rms", channels) if qk_normalization else nn.Identity()
        self.k_norm = build_norm("rms", channels) if qk_normalization else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        """Attend from every token to all tokens.

        Args:
            x_BND: (B, N, D), any float dtype.

        Returns:
            The same shape and dtype.
        """
        batch, tokens, channels = x_BND.shape
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=-1)
        q_BHNE, k_BHNE, v_BHNE = (
            y_BND.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for y_BND in (self.q_norm(q_BND), self.k_norm(k_BND), v_BND)
        )
        out_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        return self.proj(out_BHNE.transpose(1, 2).reshape(batch, tokens, channels))


class Mlp(nn.Module):
    """Two projections with a GELU between them.

    Args:
        channels: D.
        hidden: channels between the two projections.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Transform every token on its own.

        Args:
            x_BND: (B, N, D), any float dtype.

        Returns:
            The same shape and dtype.
        """
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then MLP, each scaled per channel and per sample.

    Args:
        channels: D.
        num_heads: H.
        mlp_ratio: hidden channels of the MLP over D.
        qkv_bias: whether the joint projection has a bias.
        qk_normalization: normalise queries and keys.
        norm: `rms` or `layer`.
        init_values: first value of LayerScale; 0 or None for none.
        layerscale_in_fp32: multiply LayerScale in FP32.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_normalization: bool,
        norm: str,
        init_values: float | None,
        layerscale_in_fp32: bool,
    ) -> None:
        super().__init__()

        def build_scale() -> nn.Module:
            return LayerScale(channels, init_values, layerscale_in_fp32) if init_values else nn.Identity()

        self.norm1 = build_norm(norm, channels)
        self.attn = Attention(channels, num_heads, qkv_bias, qk_normalization)
        self.ls1 = build_scale()
        self.norm2 = build_norm(norm, channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.ls2 = build_scale()

    def forward(self, x_BND: Tensor, branch_scale_2B: Tensor | None = None) -> Tensor:
        """Add both residual branches.

        Args:
            x_BND: (B, N, D), any float dtype.
            branch_scale_2B: per sample, the factor on the attention and on the MLP branch: 0 where drop
                path leaves it out. It comes in as an argument, so that recomputing the block under
                activation checkpointing drops exactly what the first pass dropped. None: both are 1.

        Returns:
            The same shape and dtype.
        """
        if branch_scale_2B is None:
            x_BND = x_BND + self.ls1(self.attn(self.norm1(x_BND)))
            return x_BND + self.ls2(self.mlp(self.norm2(x_BND)))
        attn_scale_B11, mlp_scale_B11 = branch_scale_2B.to(x_BND.dtype)[..., None, None]
        x_BND = x_BND + attn_scale_B11 * self.ls1(self.attn(self.norm1(x_BND)))
        return x_BND + mlp_scale_B11 * self.ls2(self.mlp(self.norm2(x_BND)))
