"""Layer-wise decay of the real 6B models, built on the meta device: groups, rates and exemptions of every parameter.

The expected values are written down here from the recipe, not taken from ds_seg.engine.groups.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from ds_seg.config import RunOptions, build_run_config
from ds_seg.engine import groups as groups_module
from ds_seg.engine.groups import build_param_groups, format_groups
from ds_seg.models import build_heads

from mmseg.models.builder import build_backbone  # isort: skip

RATE, DECAY, LR = 0.95, 0.05, 4e-5
SCALE_TOLERANCE = 1e-12  # measured: 4.4e-16, rounding of a product of up to 49 factors
RUNS = {48: "internvit6b_224_full_linear_ade20k", 45: "internvit6b_v2_5_full_linear_ade20k"}
IMAGE_PX = {48: 224, 45: 448}
PARAMETERS = {48: 5_902_793_600, 45: 5_536_496_000}
EXEMPT = "norm1.weight norm2.weight ls1.gamma ls2.gamma attn.q_norm.weight attn.k_norm.weight"
EXEMPT += " attn.proj.bias mlp.fc1.bias mlp.fc2.bias"
DECAYED = "attn.qkv.weight attn.proj.weight mlp.fc1.weight mlp.fc2.weight"
POSITIONS = ("backbone.cls_token", "backbone.pos_embed")


def expected_values(depth, decay_embeddings):
    """Name of every parameter of the backbone and the linear head -> (factor of the rate, weight decay)."""
    last = depth + 1
    layer_of = dict.fromkeys(POSITIONS, (0, DECAY if decay_embeddings else 0.0))
    layer_of |= {"backbone.patch_embed.proj.weight": (0, DECAY), "backbone.patch_embed.proj.bias": (0, 0.0)}
    for block in range(depth):
        for names, decay in ((EXEMPT, 0.0), (DECAYED, DECAY)):
            layer_of |= {f"backbone.blocks.{block}.{name}": (block + 1, decay) for name in names.split()}
    layer_of |= {"decode_head.conv_seg.weight": (last, DECAY), "decode_head.conv_seg.bias": (last, 0.0)}
    layer_of |= {f"decode_head.norm.{name}": (last, 0.0) for name in ("weight", "bias")}
    values = {}
    for name, (layer, decay) in layer_of.items():
        scale = 1.0
        for _ in range(last - layer):
            scale *= RATE
        values[name] = (scale, decay)
    return values


@pytest.fixture(scope="module", params=[48, 45])
def depth(request):
    return request.param


@pytest.fixture(scope="module")
def run(depth):
    size = {"model.backbone.img_size": IMAGE_PX[depth]}
    return build_run_config(RunOptions(RUNS[depth], cfg_options=size), world_size=1)


@pytest.fixture(scope="module")
def model(run):
    """The real backbone, without memory behind it, and its head."""
    model = nn.Module()
    with torch.device("meta"):
        model.backbone = build_backbone(run.model.backbone)
    model.decode_head = build_heads(run.model).decode_head
    return model


@pytest.fixture(scope="module")
def named(model):
    return list(model.named_parameters())


def build(model, depth, run, **changes):
    settings = groups_module.OptimizerSettings(**{**vars(run.optimizer), **changes})
    return build_param_groups(model.named_modules(), depth, settings)


def worst_scale_difference(built, depth, decay_embeddings=False):
    expected = expected_values(depth, decay_embeddings)
    return max(abs(group["base_lr"] / LR / expected[name][0] - 1) for group in built for name in group["names"])


def misplaced(built, named, depth, decay_embeddings=False):
    """How many parameters are missing, doubled, unknown, or in a group of another weight decay."""
    expected = expected_values(depth, decay_embeddings)
    found = Counter(name for group in built for name in group["names"])
    held = Counter(id(parameter) for group in built for parameter in group["params"])
    wrong = [name for name in {*expected, *found} if found[name] != 1 or name not in expected]
    wrong += [name for name, parameter in named if held[id(parameter)] != 1]
    wrong += [n for group in built for n in group["names"] if n in expected and group["weight_decay"] != expected[n][1]]
    return len(wrong)


def test_the_real_models_have_their_published_size(named, depth, claim):
    backbone = [parameter for name, parameter in named if name.startswith("backbone.")]
    total = sum(parameter.numel() for parameter in backbone)
    assert all(parameter.is_meta for parameter in backbone)
    claim(
        f"parameters of the backbone with {depth} blocks at {IMAGE_PX[depth]} px",
        measured=abs(total - PARAMETERS[depth]),
        tolerance=1,
        against=f"{PARAMETERS[depth]:,}",
    )


@pytest.mark.parametrize("decay_embeddings", [False, True], ids=["ours", "published"])
def test_rates_and_decays_of_the_real_models(model, named, depth, run, claim, decay_embeddings):
    built = build(model, depth, run, decay_embeddings=decay_embeddings)
    rule = "position embeddings decayed" if decay_embeddings else "position embeddings exempt"
    claim(
        f"layer decay, {depth} blocks, {rule}: rate factor of every group, relative",
        measured=worst_scale_difference(built, depth, decay_embeddings),
        tolerance=SCALE_TOLERANCE,
        against="0.95 multiplied n - 1 - id times",
    )
    claim(
        f"layer decay, {depth} blocks, {rule}: parameters missing, doubled or with another weight decay",
        measured=misplaced(built, named, depth, decay_embeddings),
        tolerance=1,
        against="a list of all names",
    )


def test_one_group_for_each_rate_and_decay(model, depth, run):
    """Embeddings, each block and the head have one group that is decayed and one that is not."""
    built = build(model, depth, run)
    keys = [(group["base_lr"], group["weight_decay"]) for group in built]
    assert len(built) == len(set(keys)) == 2 * (depth + 2)
    assert {group["weight_decay"] for group in built} == {0.0, DECAY}
    assert [group["layers"] for group in built[:4]] == ["embeddings", "embeddings", "block 0", "block 0"]
    assert built[-1]["layers"] == "heads"


@pytest.mark.parametrize(("rate", "count"), [(1.0, 2), (None, 1)])
def test_groups_that_share_rate_and_decay_are_one(model, named, depth, run, rate, count):
    """Without layer decay nothing is exempt from weight decay."""
    built = build(model, depth, run, layer_decay_rate=rate)
    assert len(built) == count and sum(len(group["params"]) for group in built) == len(named)
    assert {group["layers"] for group in built} == {f"embeddings, blocks 0-{depth - 1}, heads"}
    assert f"embeddings, blocks 0-{depth - 1}, heads" in format_groups(built)


def test_layer_ids_off_by_one_are_caught(model, depth, run, caught, monkeypatch):
    right = groups_module.layer_id
    monkeypatch.setattr(groups_module, "layer_id", lambda name, depth: min(right(name, depth) + 1, depth + 1))
    caught(
        f"layer ids off by one, {depth} blocks",
        by="test_rates_and_decays_of_the_real_models",
        measured=worst_scale_difference(build(model, depth, run), depth),
        tolerance=SCALE_TOLERANCE,
    )


def test_one_rate_everywhere_is_caught(model, depth, run, caught):
    caught(
        f"one learning rate everywhere, {depth} blocks",
        by="test_rates_and_decays_of_the_real_models",
        measured=worst_scale_difference(build(model, depth, run, layer_decay_rate=None), depth),
        tolerance=SCALE_TOLERANCE,
    )


def test_the_other_rule_for_position_embeddings_is_caught(model, named, depth, run, caught):
    caught(
        f"position embeddings decayed where they should be exempt, {depth} blocks",
        by="test_rates_and_decays_of_the_real_models",
        measured=misplaced(build(model, depth, run, decay_embeddings=True), named, depth),
        tolerance=1,
    )


def test_a_parameter_in_two_groups_or_in_none_is_caught(model, named, depth, run, caught):
    doubled, missing = build(model, depth, run), build(model, depth, run)
    for key in ("names", "params"):
        doubled[0][key].append(doubled[-1][key][-1])
        missing[0][key].pop()
    for text, built in (("twice", doubled), ("not at all", missing)):
        caught(
            f"a parameter that is in the groups {text}, {depth} blocks",
            by="test_rates_and_decays_of_the_real_models",
            measured=misplaced(built, named, depth),
            tolerance=1,
        )
