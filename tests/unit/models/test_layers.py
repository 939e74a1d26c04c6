from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_seg.models.layers import Attention, Block, ChannelNorm, LayerScale, Linear, PatchProjection, UpConv, build_norm


def internvl_rms_norm(x, weight, eps=1e-6):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def test_rms_norm_equals_the_internvl_formula_in_fp32():
    norm = build_norm("rms", 320)
    nn.init.normal_(norm.weight, mean=1, std=0.1)
    x = torch.randn(4, 9, 320) * 3
    torch.testing.assert_close(norm(x), internvl_rms_norm(x, norm.weight), rtol=1e-6, atol=1e-6)


def test_rms_norm_in_bf16_is_within_one_ulp_of_the_internvl_formula():
    # fused: one rounding; formula: two. Measured: at most 2^-7 relative, one unit in bf16's last place
    norm = build_norm("rms", 320).to(torch.bfloat16)
    nn.init.normal_(norm.weight, mean=1, std=0.1)
    x = (torch.randn(64, 320) * 3).bfloat16()
    got, wanted = norm(x).float(), internvl_rms_norm(x, norm.weight).float()
    assert got.dtype == torch.float32
    assert ((got - wanted).abs() <= wanted.abs() * 2**-7).all()
    assert not torch.allclose(got, F.rms_norm(x, (320,)).float(), rtol=2**-7, atol=0)  # the weight counts


def test_norm_statistics_are_fp32_inside_for_bf16_inputs():
    x = torch.full((1, 4096), 300.0).bfloat16()  # squares sum to 3.7e8, far beyond bf16's resolution
    torch.testing.assert_close(build_norm("rms", 4096).bfloat16()(x).float(), torch.ones(1, 4096))


def test_layer_scale_multiplies_in_fp32_when_told_to():
    x, narrow = torch.randn(2, 3, 8), LayerScale(8, 0.1, in_fp32=False)
    torch.testing.assert_close(narrow(x), x * 0.1)
    wide = LayerScale(8, 0.1, in_fp32=True)
    out = wide(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (x.bfloat16().float() * 0.1).bfloat16(), rtol=0, atol=0)
    assert narrow(x.bfloat16()).dtype == torch.float32  # an FP32 factor widens what is not cast back


@pytest.mark.parametrize("layer", [Linear(400, 300), Linear(400, 300).to_empty(device="cpu")])
def test_linear_draws_a_truncated_normal(layer):
    layer.reset_parameters()
    assert layer.weight.abs().max() <= 0.04
    assert abs(layer.weight.std().item() - 0.0176) < 2e-4  # a normal of std 0.02 cut off at 2 sigma; 120,000 draws
    assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("layer", [PatchProjection(3, 400, 14, 14), UpConv(8)])
def test_a_convolution_begins_without_a_bias(layer):
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert layer.bias.abs().max() == 0


def test_patches_are_projected_by_a_truncated_normal():
    weight = PatchProjection(3, 400, 14, 14).weight
    assert weight.abs().max() <= 0.04 and abs(weight.std().item() - 0.0176) < 2e-4


def test_up_conv_draws_by_fan_out():
    assert abs(UpConv(256).weight.std().item() - (2 / (4 * 256)) ** 0.5) < 5e-4
    assert UpConv(8)(torch.randn(1, 8, 3, 5)).shape == (1, 8, 6, 10)


def test_channel_norm_is_layer_norm_over_channels():
    norm, x = ChannelNorm(8, eps=1e-6), torch.randn(2, 8, 3, 5)
    wanted = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-6)
    torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_normalization", [False, True])
def test_attention_equals_its_definition(qk_normalization):
    layer, x = Attention(12, 3, qkv_bias=True, qk_normalization=qk_normalization), torch.randn(2, 7, 12)
    nn.init.normal_(layer.qkv.weight)
    nn.init.normal_(layer.qkv.bias)
    q, k, v = layer.qkv(x).view(2, 7, 3, 12).unbind(2)
    if qk_normalization:
        nn.init.normal_(layer.q_norm.weight, 1, 0.2)
        q, k = internvl_rms_norm(q, layer.q_norm.weight), internvl_rms_norm(k, layer.k_norm.weight)
    q, k, v = (y.view(2, 7, 3, 4).transpose(1, 2) for y in (q, k, v))
    wanted = layer.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 12))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_block_scales_each_branch_of_each_sample():
    block, x = Block(8, 2, 4.0, False, True, "rms", None, False), torch.randn(3, 5, 8)
    scale = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 3.0]])
    out = block(x, scale)
    torch.testing.assert_close(out[0], x[0], rtol=0, atol=0)
    one = x[1] + 2 * block.attn(block.norm1(x[1:2]))[0]
    torch.testing.assert_close(out[1], one + block.mlp(block.norm2(one)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block(x, torch.ones(2, 3)), block(x))
    assert block.bfloat16()(x.bfloat16(), scale).dtype == torch.bfloat16
