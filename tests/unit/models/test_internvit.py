from __future__ import annotations

import pytest
import torch

from ds_seg.errors import ConfigError, UserError
from ds_seg.models import InternViT
from ds_seg.models.internvit import draw_branch_scales

from mmseg.models.builder import BACKBONES, build_backbone  # isort: skip

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 4, "patch_size": 4, "img_size": 16, "out_indices": [1, 3]}
DINOV2_SMALL = {
    "embed_dim": 384,
    "depth": 12,
    "num_heads": 6,
    "img_size": 518,
    "norm": "layer",
    "qkv_bias": True,
    "qk_normalization": False,
    "init_values": 1.0,
    "out_indices": [11],
    "output_norm": True,
}


def build(**overrides):
    torch.manual_seed(0)
    return InternViT(**{**TINY, **overrides})


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 5_902_793_600),
        ({"depth": 45, "img_size": 448}, 5_536_496_000),
        (
            {
                "depth": 24,
                "embed_dim": 1024,
                "num_heads": 16,
                "img_size": 448,
                "norm": "layer",
                "qkv_bias": True,
                "qk_normalization": False,
            },
            304_012_288,
        ),
        (DINOV2_SMALL, 22_056_192),
    ],
)
def test_parameter_counts_of_the_family(arguments, parameters):
    with torch.device("meta"):
        model = InternViT(**arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_dinov2_small_counts_what_transformers_counts():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
        )
        ours = InternViT(**DINOV2_SMALL)
    mask_token = 384
    assert sum(p.numel() for p in theirs.parameters()) - mask_token == sum(p.numel() for p in ours.parameters())


def test_registered_under_both_names_and_takes_every_internvl_argument():
    internvl = {
        "in_chans": 3,
        "patch_size": 4,
        "img_size": 16,
        "pretrain_size": 224,
        "qkv_bias": False,
        "drop_path_rate": 0.0,
        "embed_dim": 16,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "init_values": 0.1,
        "qk_normalization": True,
        "depth": 2,
        "use_flash_attn": [True, False],
        "with_cp": True,
        "layerscale_no_force_fp32": True,
        "out_indices": [1],
        "freeze_vit": False,
        "unfreeze_pos_embed": False,
        "with_fpn": False,
        "with_final_norm": False,
        "pretrained": "weights.pth",
    }
    assert isinstance(build_backbone({"type": "InternViT6B", **internvl}), InternViT)
    assert BACKBONES.get("InternViT") is InternViT


def test_parameter_names_are_those_of_internvl():
    names = set(dict(build(with_fpn=True, with_final_norm=True, out_indices=[0, 1, 2, 3]).named_parameters()))
    block = ["norm1.weight", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "attn.q_norm.weight"]
    block += ["attn.k_norm.weight", "ls1.gamma", "norm2.weight", "ls2.gamma"]
    block += [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    wanted = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    wanted |= {f"blocks.{i}.{name}" for i in range(4) for name in block}
    pyramid = ["up1.0", "up1.1", "up1.3", "up1.4", "up2.0", "up2.1", "up3.1", "up4.1"]
    wanted |= {f"{layer}.{kind}" for layer in pyramid for kind in ("weight", "bias")}
    assert names == wanted


def test_features_of_any_size_are_contiguous_maps():
    model = build()
    assert model.out_channels == [16, 16]
    assert (model.embed_dim, model.num_features, model.depth, model.patch_size) == (16, 16, 4, 4)
    for feature in model(torch.randn(2, 3, 20, 32)):
        assert feature.shape == (2, 16, 5, 8)
        assert feature.is_contiguous()


def test_pyramid_has_the_four_scales():
    model = build(with_fpn=True, out_indices=[0, 1, 2, 3])
    shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 16, 24))]
    assert shapes == [(1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)]
    plain = build(out_indices=[0, 1, 2, 3])
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("up")})
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(model(images)[2], plain(images)[2])  # up3 is the identity


def test_taps_hold_the_state_after_their_block():
    model, images = build(out_indices=[0, 1, 2, 3]).eval(), torch.randn(1, 3, 16, 16)
    all_taps = model(images)
    model.out_indices = (1, 3)
    for got, wanted in zip(model(images), (all_taps[1], all_taps[3]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert not torch.allclose(all_taps[1], all_taps[2])


def test_output_norm_is_applied_to_every_tap():
    model = build(output_norm=True, norm="layer")
    for feature in model(torch.randn(1, 3, 16, 16)):
        torch.testing.assert_close(feature.mean(1), torch.zeros(1, 4, 4), rtol=0, atol=1e-5)


def test_images_are_cast_to_the_dtype_of_the_parameters():
    model = build().bfloat16()
    assert model.dtype == torch.bfloat16
    assert {f.dtype for f in model(torch.randn(1, 3, 16, 20))} == {torch.bfloat16}


@pytest.mark.parametrize("size", [(15, 16), (16, 18), (0, 16)])
def test_sizes_that_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(UserError, match=rf"images of {size[0]} x {size[1]} px.*multiples of its patch of 4 px.*16"):
        build()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"img_size": 18}, "img_size 18 px is not a multiple of patch_size 4 px"),
        ({"norm": "batch"}, "norm is 'batch'; use 'rms'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"out_indices": [1, 4]}, r"out_indices is \[1, 4\]; name at least one block of 0..3"),
        ({"out_indices": [3, 1]}, "in rising order"),
        ({"out_indices": []}, "name at least one block"),
        ({"out_indices": [-1]}, "each once"),
        ({"with_fpn": True}, "with_fpn makes four scales of four taps, but out_indices names 2"),
        ({"num_heads": 3, "norm": "x"}, "num_heads 3; norm is 'x'"),
        ({"checkpointing": "all"}, "checkpointing is 'all'; use one of 'none', 'selective', 'block'"),
        ({"checkpointing": "none", "with_cp": True}, "checkpointing is 'none' but with_cp is True; leave one of them"),
        ({"checkpointing": "block", "with_cp": False}, "checkpointing is 'block' but with_cp is False"),
        ({"checkpointing": "selective", "with_cp": False, "norm": "x"}, "'selective' but with_cp is False;.*; norm is"),
    ],
)
def test_contradicting_arguments_are_one_error(overrides, message):
    with pytest.raises(ConfigError, match=rf"model\.backbone \(InternViT\) can't be built: .*{message}"):
        build(**overrides)


@pytest.mark.parametrize("unfreeze", [False, True])
def test_freezing_leaves_the_pyramid(unfreeze):
    model = build(with_fpn=True, out_indices=[0, 1, 2, 3], freeze_vit=True, unfreeze_pos_embed=unfreeze)
    sum(f.sum() for f in model(torch.randn(1, 3, 16, 16))).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("up")} | (
        {"pos_embed"} if unfreeze else set()
    )


def test_a_frozen_trunk_builds_no_graph():
    features = build(freeze_vit=True)(torch.randn(1, 3, 16, 16))
    assert not any(f.requires_grad for f in features)
    assert all(f.requires_grad for f in build()(torch.randn(1, 3, 16, 16)))


def test_drop_path_follows_the_sample_and_not_its_batch():
    model, images = build(drop_path_rate=0.6), torch.randn(3, 3, 16, 16)
    together = model(images, sample_seeds=[7, 8, 9])[-1]
    alone = model(images[2:], sample_seeds=[9])[-1]
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-6)  # measured 1e-7: batched matmuls
    assert not torch.allclose(model(images[2:], sample_seeds=[10])[-1], alone, atol=1e-3)
    torch.testing.assert_close(model.eval()(images, sample_seeds=[7, 8, 9])[-1], model(images)[-1])


def test_branch_scales_rise_linearly_and_keep_the_mean():
    scales = draw_branch_scales(0.5, depth=3, batch=40_000)
    assert scales.shape == (3, 2, 40_000)
    for block, rate in zip(scales, (0.0, 0.25, 0.5), strict=True):
        assert set(block.unique().tolist()) <= {0.0, 1 / (1 - rate), torch.tensor(1 / (1 - rate)).item()}
        assert abs((block == 0).float().mean().item() - rate) < 0.01  # 80,000 draws: 3 sigma is 0.005
        assert abs(block.mean().item() - 1) < 0.015


def test_branch_scales_need_one_seed_a_sample():
    with pytest.raises(AssertionError, match="1 drop-path seeds for 2 images"):
        draw_branch_scales(0.5, 2, 2, [1])


def test_blocks_after_the_last_tap_are_not_run():
    model = InternViT(embed_dim=24, depth=3, num_heads=2, img_size=28, out_indices=[1], with_cp=False)
    wanted = model(torch.ones(1, 3, 28, 28))[0]
    model.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("the last block ran"))
    assert torch.equal(model(torch.ones(1, 3, 28, 28))[0], wanted)


@pytest.mark.parametrize(
    ("flags", "in_fp32"),
    [
        ({}, False),
        ({"layerscale_no_force_fp32": True}, False),
        ({"layerscale_no_force_fp32": False}, True),
        ({"layerscale_force_fp32": True}, True),
        ({"layerscale_force_fp32": False}, False),
        ({"layerscale_force_fp32": False, "layerscale_no_force_fp32": True}, False),
    ],
)
def test_both_names_of_the_layerscale_flag(flags, in_fp32):
    assert InternViT(**TINY, **flags).blocks[0].ls1.in_fp32 is in_fp32


def test_layerscale_flags_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"layerscale_force_fp32 and layerscale_no_force_fp32 are both True"):
        InternViT(**TINY, layerscale_force_fp32=True, layerscale_no_force_fp32=True)
