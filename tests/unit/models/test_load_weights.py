from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_seg.errors import WeightsError
from ds_seg.models import InternViT, load_backbone_weights, weight_shapes
from ds_seg.models.weight_dialects import TRUNK
from pretrained import find_dinov2_small

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16, "out_indices": [0, 1]}


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


def check_same_weights(first, second):
    for (name, got), wanted in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("output_norm", [True, False])
def test_both_spellings_of_dinov2_arrive_as_the_same_weights(tmp_path, output_norm):
    """The one that transformers 5 saves and the one that it uses itself; tests/parity holds what they compute."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
    )
    theirs = randomise(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "w.bin")
    arguments = {"norm": "layer", "qkv_bias": True, "qk_normalization": False, "output_norm": output_norm}
    first, second = build(**arguments), build(seed=1, **arguments)
    for ours, name in ((first, "model.safetensors"), (second, "w.bin")):
        report = load(ours, tmp_path / name)
        assert report.dialect == "HuggingFace Dinov2Model"
        unused = [] if output_norm else ["layernorm.bias", "layernorm.weight"]
        assert report.ignored == ["embeddings.mask_token", *unused]
        assert report.parameters == sum(p.numel() for p in ours.parameters())
    check_same_weights(first, second)


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
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_every_naming_of_internvl_arrives_as_the_same_weights(tmp_path, kind, prefix):
    """That of transformers, of InternVL and of its chat models; tests/parity holds what they compute."""
    native = build_internvl(kind).state_dict()
    published = {prefix + name: value for name, value in rename_to_intern_vision(native).items()}
    language = {"language_model.lm_head.weight": torch.ones(2), "mlp1.0.weight": torch.ones(2)} if prefix else {}
    six = kind == "6B"
    arguments = {"norm": "rms" if six else "layer", "qkv_bias": not six, "qk_normalization": six}
    first, second = build(**arguments), build(seed=1, **arguments)
    save_file(native, tmp_path / "native.safetensors")
    save_file(published | language, tmp_path / "published.safetensors")
    assert load(first, tmp_path / "native.safetensors").ignored == []
    assert load(second, tmp_path / "published.safetensors").ignored == list(language)
    check_same_weights(first, second)


def test_a_chat_model_of_transformers_leaves_its_language_model(tmp_path):
    """As it is saved, in shards between which projections are torn apart, and as its own state dict says it."""
    transformers = pytest.importorskip("transformers")
    vision = build_internvl("6B").config.to_dict()
    text = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32}
    config = transformers.InternVLConfig(vision_config=vision, text_config=text)
    chat = randomise(transformers.InternVLForConditionalGeneration(config))
    chat.save_pretrained(tmp_path, max_shard_size="12KB")
    torch.save(chat.state_dict(), tmp_path / "w.bin")
    first, second = build(), build(seed=1)
    saved = load(first, tmp_path)
    assert saved.dialect == "transformers InternVLVisionModel (-hf)"
    own = load(second, tmp_path / "w.bin")
    assert {name.partition(".")[0] for name in saved.ignored} == {"language_model", "multi_modal_projector"}
    assert (
        own.ignored_parameters
        >= saved.ignored_parameters
        == sum(
            parameter.numel()
            for name, parameter in chat.named_parameters()
            if "vision_tower" not in name and "lm_head" not in name
        )
    )
    check_same_weights(first, second)
    torch.testing.assert_close(
        first.blocks[1].attn.qkv.weight[16:32], chat.model.vision_tower.encoder.layer[1].attention.k_proj.weight
    )


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
    assert "rounded       30 tensors have more bits in the file; FP32 masters get them all" in text
    for same in (source, target):
        assert "rounded" not in load(same, save(target, tmp_path / "bf16.pth")).table()


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


def test_patch_embedding_is_resized(tmp_path):
    source, target = build().bfloat16(), build(seed=1, patch_size=8, img_size=32)
    report = load(target, save(source, tmp_path / "w.pth"))
    assert report.resized_patch == (4, 8)
    assert report.resized_positions is None
    assert "patches       resized 4 x 4 -> 8 x 8 px, pseudo-inverse" in report.table()
    images = torch.randn(1, 3, 16, 16)
    enlarged = torch.nn.functional.interpolate(  # patch by patch
        images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 1, 4, 4), size=(8, 8), mode="bicubic", antialias=True
    )
    enlarged = enlarged.view(1, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    got, wanted = target(enlarged)[1], source.float()(images)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # measured 2e-6


def test_a_pyramid_alone_completes_a_trunk(tmp_path):
    pyramid = {"with_fpn": True, "depth": 4, "out_indices": [0, 1, 2, 3]}
    source, target = build(**pyramid), build(seed=1, **pyramid)
    before = target.pos_embed.clone()
    part = {f"backbone.{k}": v for k, v in source.state_dict().items() if k.startswith("up")}
    torch.save(part, tmp_path / "w.pth")
    report = load(target, tmp_path / "w.pth", expected_missing=TRUNK)
    assert report.tensors == len(part)
    assert report.release == "no whole backbone"
    check_same_weights(target.up1, source.up1)
    torch.testing.assert_close(target.pos_embed, before)


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
        ({"depth": 3}, r"13 parameters that the file lacks \(blocks\.N\..*check depth.*output_norm in model.backbone"),
        (
            {"depth": 1, "out_indices": [0]},
            r"13 tensors that the backbone lacks \(blocks\.N\..*check depth.*output_norm in model.backbone",
        ),
        ({"qkv_bias": True}, r"2 parameters that the file lacks \(blocks\.N\.attn\.qkv\.bias \(x2\)\)"),
        ({"qk_normalization": False}, r"4 tensors that the backbone lacks .*q_norm"),
        ({"output_norm": True}, r"1 parameters that the file lacks \(norm\.weight\)"),
        ({"mlp_ratio": 2}, r"fc1.weight is \[64, 16\] in the file and \[32, 16\] in the backbone.*check embed_dim"),
        ({"embed_dim": 8}, r"cls_token is \[1, 1, 16\] .* and 26 more"),
        ({"in_chans": 1}, r"patch_embed.proj.weight is \[16, 3, 4, 4\] .*in_chans"),
        ({"depth": 3}, r"depth is 2 in the file and 3 in the config; the backbone has"),
        ({"qkv_bias": True}, r"qkv_bias is False in the file and True in the config; the backbone has"),
    ],
)
def test_a_file_of_another_model_is_named_and_writes_nothing(tmp_path, overrides, message):
    path, target = save(build(), tmp_path / "w.pth"), build(seed=1, **overrides)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"w\.pth \(InternVL .*does not fit this backbone: .*{message}"):
        load(target, path)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_file_of_another_release_names_the_config_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_shapes, "CONFIGS_ROOT", tmp_path)
    weight_shapes._read_shipped.cache_clear()
    (tmp_path / "models").mkdir()
    for depth, size_px in ((2, 16), (3, 16), (3, 32)):
        backbone = {**TINY, "type": "InternViT6B", "depth": depth, "pretrain_size": size_px}
        text = f"model = dict(backbone={backbone!r})"
        (tmp_path / "models" / f"depth{depth}_{size_px}.py").write_text(text)
    path = save(build(depth=3), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"The file fits ds_configs/models/depth3_16\.py: use it as the config's base"
    ):
        load(build(), path)
    report = load(build(depth=3), save(build(depth=3, img_size=32), path))
    assert report.release == "3 blocks of 16 channels, positions for 32 px; ds_configs/models/depth3_32.py"
    assert report.image_px == 32
    with pytest.raises(WeightsError, match=r"fits ds_configs/models/depth3_16\.py or ds_configs/models/depth3_32\.py"):
        load(build(), save(build(depth=3, img_size=24), path))
    with pytest.raises(WeightsError, match=r"embed_dim is 16 in the file.*in model\.backbone\.$"):
        load(build(embed_dim=8), save(build(depth=2, qkv_bias=True), path))
    weight_shapes._read_shipped.cache_clear()


def test_what_others_use_is_neither_ignored_nor_asked_for(tmp_path):
    path = save(build(), tmp_path / "w.pth", **{"decode_head.conv_seg.weight": torch.ones(3, 4), "odd": torch.ones(1)})
    report = load(build(), path, used_elsewhere=["odd"])
    assert report.ignored == ["decode_head.conv_seg.weight"]
    assert "ignored       1 tensors, 12 parameters: decode_head.conv_seg.weight" in report.table()


def test_the_report_tells_bytes_and_their_rate(tmp_path):
    report = load(build(), save(build(), tmp_path / "w.pth"))
    assert report.bytes == 4 * report.parameters
    assert report.seconds > 0
    assert re.search(r"read +0\.0 MiB in \d+\.\d s, \d+ MiB/s", report.table())


def test_what_the_caller_expects_to_be_missing_may_be(tmp_path):
    with pytest.raises(WeightsError, match=r"1 tensors that the backbone lacks \(blocks\.N\.adapter\)"):
        load(build(), save(build(), tmp_path / "odd.pth", **{"blocks.0.adapter": torch.ones(1)}))
    path = save(build(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"13 parameters that the file lacks \(blocks\.N\.norm1"):
        load(build(depth=3), path)
    assert len(load(build(depth=3), path, expected_missing=["blocks.2.*"]).missing) == 13


def test_unknown_dialect_names_the_file(tmp_path):
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth can't be used: its tensor names fit no known naming"):
        load(build(), tmp_path / "w.pth")


def test_a_position_table_that_is_no_square_is_refused(tmp_path):
    state = {**build().state_dict(), "pos_embed": torch.zeros(1, 12, 16)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"pos_embed is \[1, 12, 16\] in the file and \[1, 17, 16\]"):
        load(build(), tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    state = build().state_dict()
    state["blocks.1.attn.qkv.weight"][3, 5] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"w\.pth has NaN or infinite values in 1 tensors \(blocks\.N\.attn\.qkv\.weig"
    ):
        load(build(), tmp_path / "w.pth")


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    state = {name: value.to(torch.int8) if "norm1" in name else value for name, value in build().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError, match=r"2 tensors hold no floating-point numbers \(blocks\.N\.norm1\.weight \(x2\)\)"
    ):
        load(build(), tmp_path / "w.safetensors")


def test_a_real_dinov2_small_file_loads(pytestconfig):
    path = find_dinov2_small(pytestconfig)
    shape = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "img_size": 252, "out_indices": [11]}
    model = build(**shape, norm="layer", qkv_bias=True, qk_normalization=False, init_values=1.0, output_norm=True)
    report = load(model, path)
    assert report.resized_positions == (37, 18)
    assert report.missing == []
    gamma = load_file(path)["encoder.layer.5.layer_scale1.lambda1"]
    torch.testing.assert_close(model.blocks[5].ls1.gamma.data, gamma, rtol=0, atol=0)
