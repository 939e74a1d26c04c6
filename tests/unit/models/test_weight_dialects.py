from __future__ import annotations

import pytest

from ds_seg.errors import WeightsError
from ds_seg.models.weight_dialects import translate_names

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
    translation = translate_names(["backbone.blocks.0.attn.qkv.weight", "decode_head.conv_seg.weight"])
    assert translation.leftovers == ["decode_head.conv_seg.weight"]
    assert translation.is_expected_leftover("decode_head.conv_seg.weight")


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
