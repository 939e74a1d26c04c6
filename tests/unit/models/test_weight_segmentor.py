from __future__ import annotations

import pytest
import torch

from ds_seg.errors import WeightsError
from ds_seg.models import InternViT, build_heads
from ds_seg.models.weight_segmentor import load_segmentor_weights

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 4, "patch_size": 4, "img_size": 16, "out_indices": [0, 1, 2, 3]}
LINEAR = {"type": "FCNHead", "in_channels": 16, "channels": 16, "num_convs": 0, "num_classes": 5, "with_norm": True}
AUXILIARY = {"type": "FCNHead", "in_channels": 16, "channels": 8, "num_convs": 1, "num_classes": 5, "in_index": 1}
CLASSES = ("wall", "building", "sky", "floor", "tree")


def randomise(module, seed):
    torch.manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape).abs() if tensor.is_floating_point() else torch.tensor(7))
    return module


def build(seed=0, auxiliary=AUXILIARY, **overrides):
    model = {"decode_head": {**LINEAR, **overrides}, **({"auxiliary_head": auxiliary} if auxiliary else {})}
    return randomise(InternViT(**TINY), seed), randomise(build_heads(model), seed)


def save(path, backbone, heads, *, drop=()):
    """A checkpoint as MMSegmentation writes it; one auxiliary head has no number there."""
    parts = {} if backbone is None else {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    parts |= {} if heads is None else {k.replace("heads.0.", "head."): v for k, v in heads.state_dict().items()}
    state = {name: value for name, value in parts.items() if not any(part in name for part in drop)}
    torch.save({"meta": {"CLASSES": CLASSES}, "state_dict": state}, path)
    return path


def load(backbone, heads, path, *, trunk_path=None, needs_head=True):
    lines = []
    _, report = load_segmentor_weights(
        backbone, heads, path, trunk_path=trunk_path, needs_head=needs_head, log=lines.append
    )
    assert lines[-1] == report.table()
    return report, "\n".join(lines)


def differing(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    return {name for (name, got), wanted in pairs if not torch.equal(got, wanted)}


def test_backbone_heads_and_running_statistics_arrive(tmp_path):
    source, target = build(), build(seed=1)
    report, text = load(*target, save(tmp_path / "w.pth", *source))
    for got, wanted in zip(target, source, strict=True):
        assert differing(got, wanted) == set()
    state = source[1].state_dict()
    assert report.tensors == len(state)
    assert report.parameters == sum(value.numel() for value in state.values())
    assert report.left_initial == report.ignored == []
    assert "ignored       none" in text
    assert "classes       5: wall, building, sky, floor, tree" in text


def test_the_counter_of_batches_may_be_absent(tmp_path):
    source, target = build(), build(seed=1)
    path = save(tmp_path / "w.pth", *source, drop=["num_batches_tracked"])
    report, _ = load(*target, path)
    assert report.left_initial == []
    assert differing(target[1], source[1]) == set()
    assert target[1].decode_head.norm.num_batches_tracked == 7


def test_an_auxiliary_head_may_be_absent_on_either_side(tmp_path):
    source, target = build(auxiliary=None), build(seed=1)
    report, text = load(*target, save(tmp_path / "w.pth", *source))
    assert "left initial  auxiliary_head: the file has none" in text
    assert report.tensors == len(source[1].state_dict())
    source, target = build(), build(seed=1, auxiliary=None)
    report, _ = load(*target, save(tmp_path / "w.pth", *source))
    assert sorted({name.partition(".")[0] for name in report.ignored}) == ["auxiliary_head"]
    assert differing(target[0], source[0]) == set()


def test_auxiliary_heads_with_numbers(tmp_path):
    source, target = build(auxiliary=[AUXILIARY, LINEAR]), build(seed=1, auxiliary=[AUXILIARY, LINEAR])
    state = {k.replace("heads.", "head."): v for k, v in source[1].state_dict().items()}
    state |= {f"backbone.{k}": v for k, v in source[0].state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    load(*target, tmp_path / "w.pth")
    assert differing(target[1], source[1]) == set()


def test_a_start_keeps_what_fits_of_a_head_with_other_classes(tmp_path):
    source, target = build(), build(seed=1, num_classes=7)
    path = save(tmp_path / "w.pth", *source)
    before = target[1].decode_head.conv_seg.weight.clone()
    report, text = load(*target, path, needs_head=False)
    assert report.tensors == len(source[1].state_dict()) - 2
    assert "left initial  decode_head: decode_head.conv_seg.weight is [5, 16, 1, 1] in the file and [7, 16" in text
    torch.testing.assert_close(target[1].decode_head.conv_seg.weight, before)
    assert differing(target[1].decode_head.norm, source[1].decode_head.norm) == set()


def test_a_start_leaves_a_head_of_another_structure(tmp_path):
    source, target = build(), build(seed=1, with_norm=False)
    _, untouched = build(seed=1, with_norm=False)
    report, _ = load(*target, save(tmp_path / "w.pth", *source), needs_head=False)
    assert differing(target[1].decode_head, untouched.decode_head) == set()
    assert "the file's head has 5 tensors that it lacks (decode_head.norm.weight, " in report.left_initial[0]
    assert "decode_head.norm.weight" in report.ignored


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_classes": 7}, r"conv_seg\.weight is \[5, 16, 1, 1\] in the file and \[7, .*classes: 5: wall, building"),
        ({"with_norm": False}, r"the file's head has 5 tensors that it lacks \(decode_head\.norm\.weight"),
        ({"num_convs": 1}, r"the config's head has \d+ tensors that the file lacks \(decode_head\.convs\.N\.conv"),
    ],
)
def test_a_prediction_needs_the_very_head(tmp_path, overrides, message):
    target = build(seed=1, **overrides)
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in target]
    path = save(tmp_path / "w.pth", *build())
    with pytest.raises(WeightsError, match=rf"w\.pth does not fit the heads .*{message}"):
        load(*target, path)
    for module, state in zip(target, before, strict=True):
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_the_original_head_with_a_convolution_over_the_concatenation_is_refused(tmp_path):
    backbone, heads = build()
    state = heads.state_dict() | {"decode_head.conv_cat.conv.weight": torch.ones(16, 32, 3, 3)}
    torch.save(state | {f"backbone.{k}": v for k, v in backbone.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"lacks \(decode_head\.conv_cat\.conv\.weight\); InternVL's FCNHead applies"
    ):
        load(backbone, heads, tmp_path / "w.pth")


@pytest.mark.parametrize("with_pyramid", [True, False])
def test_heads_alone_take_the_trunk_from_its_own_file(tmp_path, with_pyramid):
    arguments = {**TINY, "with_fpn": with_pyramid}
    source, target = randomise(InternViT(**arguments), 0), randomise(InternViT(**arguments), 1)
    heads, target_heads = build()[1], build(seed=1)[1]
    trunk = save(tmp_path / "trunk.pth", source, None, drop=["backbone.up"])
    path = save(tmp_path / "w.pth", source, heads, drop=["blocks.", "cls_token", "pos_embed", "patch_embed"])
    load(target, target_heads, path, trunk_path=trunk)
    assert differing(target, source) == set()
    assert differing(target_heads, heads) == set()
    with pytest.raises(WeightsError, match=r"holds heads without a backbone\. Set load_from or model\.backbone\.pretr"):
        load(target, target_heads, path)


def test_a_backbone_alone_is_a_start_and_no_prediction(tmp_path):
    source, target = build(), build(seed=1)
    path = save(tmp_path / "w.pth", source[0], None)
    _, text = load(*target, path, needs_head=False)
    assert differing(target[0], source[0]) == set()
    assert "heads         0 tensors" in text
    assert "left initial  decode_head: the file has none" in text
    with pytest.raises(WeightsError, match=r"holds no decode head, so there is nothing to predict with.*--load-from"):
        load(*target, path)


def test_values_of_a_head_that_are_not_finite_are_refused(tmp_path):
    source = build()
    source[1].decode_head.norm.running_var[2] = float("inf")
    path = save(tmp_path / "w.pth", *source)
    with pytest.raises(
        WeightsError, match=r"w\.pth has NaN or infinite values in 1 tensors \(decode_head\.norm\.running_var"
    ):
        load(*build(), path)


def test_a_head_of_integers_is_refused_where_it_is_needed(tmp_path):
    path = save(tmp_path / "w.pth", *build())
    content = torch.load(path)
    name = "decode_head.conv_seg.bias"
    content["state_dict"][name] = content["state_dict"][name].to(torch.int8)
    torch.save(content, path)
    with pytest.raises(WeightsError, match=rf"decode_head: {name} holds no floating-point numbers in the file"):
        load(*build(), path)
    _, text = load(*build(), path, needs_head=False)
    assert f"left initial  decode_head: {name} holds no floating-point numbers" in text


def test_a_file_of_something_else(tmp_path):
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"fit no known naming of a ViT backbone"):
        load(*build(), tmp_path / "w.pth", needs_head=False)
