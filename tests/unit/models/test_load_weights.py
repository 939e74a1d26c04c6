from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_seg.errors import WeightsError
from ds_seg.models import InternViT, load_backbone_weights
from ds_seg.models.load_weights import summarise_names

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16, "out_indices": [0, 1]}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # FP32, features of size 3 to 6; measured 0 against transformers 5.23


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = InternViT(**{**TINY, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(model, path, prefix="", **extra):
    torch.save({**{prefix + k: v for k, v in model.state_dict().items()}, **extra}, path)
    return path


def load(model, path, **arguments):
    lines = []
    report = load_backbone_weights(model, path, log=lines.append, **arguments)
    assert lines == [report.table()]
    return report


def randomise(module):
    """Give every parameter a value that matters: transformers starts from zeros and ones."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return module.eval()


def check_features(ours, theirs, hidden_size_px=(24, 40), norm=None):
    """Compare our taps with transformers' hidden states on a non-square image."""
    images = torch.randn(2, 3, *hidden_size_px)
    with torch.no_grad():
        states = theirs(pixel_values=images, output_hidden_states=True).hidden_states[1:]
        features = ours(images)
    for feature, state in zip(features, states, strict=True):
        state = norm(state) if norm else state
        wanted = state[:, 1:].transpose(1, 2).unflatten(2, (hidden_size_px[0] // 4, hidden_size_px[1] // 4))
        torch.testing.assert_close(feature, wanted, **TOLERANCE)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
    )
    theirs, folder = randomise(transformers.Dinov2Model(config)), tmp_path_factory.mktemp("dinov2")
    theirs.save_pretrained(folder)
    return theirs, folder / "model.safetensors"


@pytest.mark.parametrize("output_norm", [True, False])
def test_dinov2_features_equal_those_of_transformers(dinov2, output_norm):
    theirs, path = dinov2
    ours = build(norm="layer", qkv_bias=True, qk_normalization=False, output_norm=output_norm)
    with torch.no_grad(), pytest.raises(AssertionError, match="not close"):
        check_features(ours, theirs, norm=theirs.layernorm if output_norm else None)
    report = load(ours, path)
    check_features(ours, theirs, norm=theirs.layernorm if output_norm else None)
    assert report.dialect == "HuggingFace Dinov2Model"
    assert report.ignored == ["embeddings.mask_token"] + ([] if output_norm else ["layernorm.bias", "layernorm.weight"])
    assert report.parameters == sum(p.numel() for p in ours.parameters())


def test_dinov2_state_dict_saved_by_transformers_5(dinov2, tmp_path):
    theirs, _ = dinov2
    torch.save(theirs.state_dict(), tmp_path / "w.bin")
    ours = build(norm="layer", qkv_bias=True, qk_normalization=False, output_norm=True)
    load(ours, tmp_path / "w.bin")
    check_features(ours, theirs, norm=theirs.layernorm)


def build_internvl(kind):
    transformers = pytest.importorskip("transformers")
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    rms = kind == "6B"
    config = transformers.InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=[4, 4],
        image_size=[16, 16],
        norm_type="rms_norm" if rms else "layer_norm",
        use_qk_norm=rms,
        attention_bias=not rms,
        hidden_act="gelu",
    )
    return randomise(InternVLVisionModel(config))


def rename_to_intern_vision(state):
    """transformers' own names -> those of the InternVisionModel that InternVL publishes."""
    renamed = {}
    for name, value in state.items():
        if ".attention.q_proj." in name:
            value = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("attention.q_proj", "attn.qkv")
        elif ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        for old, new in (
            ("encoder.layer.", "encoder.layers."),
            ("attention.projection_layer", "attn.proj"),
            ("attention.", "attn."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("lambda_", "ls"),
            ("patch_embeddings.projection", "patch_embedding"),
            ("position_embeddings", "position_embedding"),
            ("cls_token", "class_embedding"),
        ):
            name = name.replace(old, new)
        renamed[name] = value.clone()
    return renamed


@pytest.mark.parametrize("kind", ["6B", "300M"])
@pytest.mark.parametrize("dialect", ["native", "published", "chat"])
def test_internvl_features_equal_those_of_transformers(tmp_path, kind, dialect):
    theirs = build_internvl(kind)
    path = tmp_path / "w.safetensors"
    state = theirs.state_dict()
    if dialect != "native":
        state = rename_to_intern_vision(state)
    if dialect == "chat":
        state = {"vision_model." + name: value for name, value in state.items()}
        state |= {"language_model.lm_head.weight": torch.ones(2), "mlp1.0.weight": torch.ones(2)}
    save_file(state, path)
    six = kind == "6B"
    ours = build(norm="rms" if six else "layer", qkv_bias=not six, qk_normalization=six)
    report = load(ours, path)
    check_features(ours, theirs)
    assert report.ignored == (["language_model.lm_head.weight", "mlp1.0.weight"] if dialect == "chat" else [])


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_internvl_pth_arrives_exactly(tmp_path, prefix):
    source, target = build(), build(seed=1).bfloat16()
    path = save(source, tmp_path / "w.pth", prefix, **{"decode_head.conv_seg.weight": torch.ones(1)})
    report = load(target, path)
    for (name, got), wanted in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted.bfloat16(), rtol=0, atol=0, msg=name)
    assert report.tensors == 30
    assert report.ignored == ["decode_head.conv_seg.weight"]
    assert report.resized_positions is None
    text = report.table()
    for part in (str(path), "InternVL segmentation backbone", "30 tensors", f"{report.parameters:,} parameters"):
        assert part in text
    assert "decode_head.conv_seg.weight" in text


def test_position_table_is_resized_in_fp32(tmp_path):
    source, target = build().bfloat16(), build(seed=1, img_size=24)
    report = load(target, save(source, tmp_path / "w.pth"))
    assert report.resized_positions == (4, 6)
    assert "resized 4 x 4 -> 6 x 6 patches, bicubic in FP32" in report.table()
    table = source.pos_embed.float()
    grid = table[0, 1:].view(4, 4, 16).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(target.pos_embed[:, 1:], wanted, rtol=0, atol=0)
    torch.testing.assert_close(target.pos_embed[:, :1], table[:, :1], rtol=0, atol=0)
    images = torch.randn(1, 3, 24, 24)  # the same features as interpolating at each forward
    torch.testing.assert_close(target(images)[1], source.float()(images)[1], rtol=1e-5, atol=1e-6)


def test_pyramid_may_be_absent_but_not_half(tmp_path):
    pyramid = {"with_fpn": True, "depth": 4, "out_indices": [0, 1, 2, 3]}
    source, target = build(depth=4), build(seed=1, **pyramid)
    before = target.up1[0].weight.clone()
    report = load(target, save(source, tmp_path / "w.pth"))
    assert {name.partition(".")[0] for name in report.missing} == {"up1", "up2"}
    assert "left initial" in report.table()
    torch.testing.assert_close(target.up1[0].weight, before)
    half = {k: v for k, v in build(**pyramid).state_dict().items() if not k.startswith("up2")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"2 parameters that the file lacks \(up2\.N\.weight, up2\.N\.bias\)"):
        load(target, tmp_path / "half.pth")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3}, r"13 parameters that the file lacks \(blocks\.N\..*check depth.*expected_missing"),
        ({"depth": 1, "out_indices": [0]}, r"13 tensors that the backbone lacks \(blocks\.N\..*expected_unexpected"),
        ({"qkv_bias": True}, r"2 parameters that the file lacks \(blocks\.N\.attn\.qkv\.bias \(x2\)\)"),
        ({"qk_normalization": False}, r"4 tensors that the backbone lacks .*q_norm"),
        ({"output_norm": True}, r"1 parameters that the file lacks \(norm\.weight\)"),
        ({"mlp_ratio": 2}, r"fc1.weight is \[64, 16\] in the file and \[32, 16\] in the backbone.*check embed_dim"),
        ({"embed_dim": 8}, r"cls_token is \[1, 1, 16\] .* and 26 more"),
        ({"patch_size": 8}, r"patch_embed.proj.weight is \[16, 3, 4, 4\] .*patch_size"),
    ],
)
def test_a_file_of_another_model_is_named_and_writes_nothing(tmp_path, overrides, message):
    path, target = save(build(), tmp_path / "w.pth"), build(seed=1, **overrides)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"w\.pth \(InternVL .*does not fit this backbone: .*{message}"):
        load(target, path)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_expectations_of_the_caller(tmp_path):
    path = save(build(), tmp_path / "w.pth", **{"blocks.0.adapter": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"1 tensors that the backbone lacks \(blocks\.N\.adapter\)"):
        load(build(depth=3), path)
    report = load(build(depth=3), path, expected_missing=["blocks.2.*"], expected_unexpected=["*adapter"])
    assert len(report.missing) == 13
    assert report.ignored == ["blocks.0.adapter"]


def test_unknown_dialect_names_the_file(tmp_path):
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth can't be used: its tensor names fit no known naming"):
        load(build(), tmp_path / "w.pth")


def test_a_position_table_that_is_no_square_is_refused(tmp_path):
    state = {**build().state_dict(), "pos_embed": torch.zeros(1, 12, 16)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"pos_embed is \[1, 12, 16\] in the file and \[1, 17, 16\]"):
        load(build(), tmp_path / "w.pth")


def test_names_are_summarised():
    names = [f"blocks.{i}.norm1.weight" for i in range(3)] + ["up1.0.bias"]
    assert summarise_names(names) == "blocks.N.norm1.weight (x3), up1.N.bias"
    assert summarise_names([]) == "none"
    assert summarise_names([f"{letter}.weight" for letter in "abcdefghij"]).endswith(", and 2 more kinds")


@pytest.mark.skipif("DINOV2_SMALL_FILE" not in os.environ, reason="DINOV2_SMALL_FILE names no real DINOv2-S/14 file")
def test_a_real_dinov2_small_file_loads():
    path = Path(os.environ["DINOV2_SMALL_FILE"])
    shape = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "img_size": 252, "out_indices": [11]}
    model = build(**shape, norm="layer", qkv_bias=True, qk_normalization=False, init_values=1.0, output_norm=True)
    report = load(model, path)
    assert report.resized_positions == (37, 18)
    assert report.missing == []
    gamma = load_file(path)["encoder.layer.5.layer_scale1.lambda1"]
    torch.testing.assert_close(model.blocks[5].ls1.gamma.data, gamma, rtol=0, atol=0)
