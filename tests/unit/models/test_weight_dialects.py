from __future__ import annotations

import pytest

from ds_seg.errors import WeightsError
from ds_seg.models.weight_dialects import holds_pyramid, holds_trunk, translate_head_names, translate_names

MMSEG = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"]


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_internvl_names_are_ours(prefix):
    translation = translate_names([prefix + name for name in MMSEG])
    assert translation.sources == {name: (prefix + name,) for name in MMSEG}
    assert translation.leftovers == []
    assert translation.dialect.title == "InternVL segmentation backbone"


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_intern_vision_model(prefix):
    pairs = {
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "encoder.layers.11.ls1": "blocks.11.ls1.gamma",
        "encoder.layers.11.ls2": "blocks.11.ls2.gamma",
        "encoder.layers.11.attn.qkv.weight": "blocks.11.attn.qkv.weight",
        "encoder.layers.11.attn.q_norm.weight": "blocks.11.attn.q_norm.weight",
        "encoder.layers.11.mlp.fc1.bias": "blocks.11.mlp.fc1.bias",
        "encoder.layers.11.norm2.weight": "blocks.11.norm2.weight",
    }
    translation = translate_names([prefix + name for name in pairs])
    assert translation.sources == {ours: (prefix + theirs,) for theirs, ours in pairs.items()}


def test_chat_models_leave_their_language_model():
    names = [
        "vision_model.encoder.layers.0.attn.qkv.weight",
        "language_model.model.norm.weight",
        "mlp1.0.weight",
        "odd",
    ]
    translation = translate_names(names)
    assert translation.leftovers == names[1:]
    assert [translation.is_expected_leftover(name) for name in names[1:]] == [True, True, False]
    assert translation.is_expected_leftover("odd", ["o?d"])


@pytest.mark.parametrize("prefix", ["", "vision_tower.", "model.vision_tower."])
def test_transformers_native_internvl(prefix):
    pairs = {
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "encoder.layer.7.attention.projection_layer.bias": "blocks.7.attn.proj.bias",
        "encoder.layer.7.attention.q_norm.weight": "blocks.7.attn.q_norm.weight",
        "encoder.layer.7.layernorm_before.weight": "blocks.7.norm1.weight",
        "encoder.layer.7.layernorm_after.bias": "blocks.7.norm2.bias",
        "encoder.layer.7.lambda_1": "blocks.7.ls1.gamma",
        "encoder.layer.7.lambda_2": "blocks.7.ls2.gamma",
        "encoder.layer.7.mlp.fc2.weight": "blocks.7.mlp.fc2.weight",
    }
    qkv = [f"{prefix}encoder.layer.7.attention.{part}_proj.weight" for part in "qkv"]
    others = ["lm_head.weight", "model.language_model.norm.weight", "model.multi_modal_projector.linear_1.bias"]
    translation = translate_names([*(prefix + name for name in pairs), *reversed(qkv), *others])
    assert translation.sources.pop("blocks.7.attn.qkv.weight") == tuple(qkv)
    assert translation.sources == {ours: (prefix + theirs,) for theirs, ours in pairs.items()}
    assert translation.leftovers == others
    assert all(translation.is_expected_leftover(name) for name in others)


@pytest.mark.parametrize(
    ("mark", "others"),
    [
        (
            "vision_model.encoder.layers.0.attn.qkv.weight",
            ["qllama.model.norm.weight", "query_tokens", "itm_head.bias"],
        ),
        ("vision_model.encoder.layers.0.attn.qkv.weight", ["clip_projector2.norm1_k.weight", "logit_scale"]),
        ("model.vision_tower.vision_tower.encoder.layers.0.attn.qkv.weight", ["model.layers.0.mlp.up_proj.weight"]),
        ("model.vision_tower.vision_tower.encoder.layers.0.attn.qkv.weight", ["model.mm_projector.0.weight"]),
    ],
)
def test_older_chat_models_leave_the_rest_of_them(mark, others):
    translation = translate_names([mark, *others])
    assert translation.leftovers == others
    assert all(translation.is_expected_leftover(name) for name in others)


def test_heads_of_a_segmentor():
    names = ["backbone.cls_token", "decode_head.conv_seg.weight", "module.auxiliary_head.convs.0.bn.bias"]
    assert translate_head_names(names) == {
        "decode_head.conv_seg.weight": "decode_head.conv_seg.weight",
        "auxiliary_heads.0.convs.0.bn.bias": "module.auxiliary_head.convs.0.bn.bias",
    }
    assert translate_head_names(["auxiliary_head.1.conv_seg.bias", "decode_head.0.conv_seg.bias"]) == {
        "auxiliary_heads.1.conv_seg.bias": "auxiliary_head.1.conv_seg.bias",
        "decode_head.0.conv_seg.bias": "decode_head.0.conv_seg.bias",
    }


@pytest.mark.parametrize("mark", ["blocks.0.attn.qkv.weight", "encoder.layers.0.attn.qkv.weight"])
def test_a_pyramid_goes_with_every_naming(mark):
    names = ["backbone." + mark, "backbone.up1.0.weight"]
    translation = translate_names(names)
    assert translation.sources["up1.0.weight"] == ("backbone.up1.0.weight",)
    assert holds_trunk(names) and holds_pyramid(names)


def test_a_pyramid_alone():
    names = ["backbone.up1.0.weight", "backbone.up2.0.bias"]
    assert translate_names(names).sources == {name.removeprefix("backbone."): (name,) for name in names}
    assert holds_pyramid(names) and not holds_trunk(names)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_dinov2_projections_are_joined_in_order(kind):
    parts = [f"encoder.layer.3.attention.attention.{name}.{kind}" for name in ("value", "key", "query")]
    translation = translate_names(["encoder.layer.3.layer_scale1.lambda1", *parts])
    assert translation.sources["blocks.3.attn.qkv." + kind] == tuple(reversed([parts[0], parts[1], parts[2]]))
    assert translation.sources["blocks.3.ls1.gamma"] == ("encoder.layer.3.layer_scale1.lambda1",)


def test_dinov2_names():
    pairs = {
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "encoder.layer.0.layer_scale1.lambda1": "blocks.0.ls1.gamma",
        "encoder.layer.0.layer_scale2.lambda1": "blocks.0.ls2.gamma",
        "encoder.layer.0.attention.output.dense.bias": "blocks.0.attn.proj.bias",
        "encoder.layer.0.norm1.weight": "blocks.0.norm1.weight",
        "encoder.layer.0.mlp.fc2.weight": "blocks.0.mlp.fc2.weight",
        "layernorm.weight": "norm.weight",
    }
    translation = translate_names([*pairs, "embeddings.mask_token"])
    assert translation.sources == {ours: (theirs,) for theirs, ours in pairs.items()}
    assert translation.leftovers == ["embeddings.mask_token"]
    assert translation.is_expected_leftover("embeddings.mask_token")


def test_an_incomplete_projection_stays_a_leftover():
    names = ["encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.attention.query.weight"]
    translation = translate_names(names)
    assert translation.leftovers == names[1:]
    assert not translation.is_expected_leftover(names[1])


def test_a_whole_segmentor_leaves_its_heads():
    heads = ["decode_head.conv_seg.weight", "module.auxiliary_head.0.bias", "ema_backbone_pos_embed"]
    translation = translate_names(["backbone.blocks.0.attn.qkv.weight", *heads])
    assert translation.leftovers == heads
    assert all(translation.is_expected_leftover(name) for name in heads)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer1.0.conv1.weight", "fc.bias"], r"fit no known naming.*it holds 2: fc.bias, layer1.*Rename"),
        ([], r"it holds 0: nothing"),
        (
            ["teacher.blocks.0.attn.qkv.weight", "student.blocks.0.attn.qkv.weight"],
            r"more than one backbone \(.*under 'teacher\.'; .*under 'student\.'\)",
        ),
    ],
)
def test_names_that_mean_no_single_backbone(names, message):
    with pytest.raises(WeightsError, match=message):
        translate_names(names)
