import pytest
import torch
from torch import nn

from ds_seg.config import KindMultipliers, OptimizerSettings
from ds_seg.config.faults import Faults
from ds_seg.config.optimizer import read_optimizer
from ds_seg.engine.groups import build_param_groups, describe_layers, find_idle_multipliers, format_groups, layer_id
from ds_seg.models import InternViT, build_heads

from mmcv.runner import build_optimizer  # isort: skip

DEPTH = 3
HEAD = dict(type="FCNHead", in_channels=28, channels=28, num_convs=0, num_classes=4, with_norm=True)


def settings(**changes):
    values = dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        layer_decay_rate=0.5,
        decay_embeddings=False,
        multipliers={},
    )
    return OptimizerSettings(**{**values, **changes})


def build_model(norm, qk_normalization):
    """Backbone and head under the names that they have in a run."""
    shape = dict(embed_dim=28, depth=DEPTH, num_heads=2, img_size=28, out_indices=[DEPTH - 1], with_cp=False)
    model = nn.Module()
    model.backbone = InternViT(**shape, norm=norm, qk_normalization=qk_normalization)
    model.decode_head = build_heads({"decode_head": HEAD}).decode_head
    return model


@pytest.fixture(scope="module")
def model():
    return build_model("rms", True)


@pytest.fixture(scope="module")
def model_with_layer_norms():
    """MMCV knows no RMSNorm. The convolution is depth-wise."""
    model = build_model("layer", False)
    model.decode_head.depthwise = nn.Conv2d(4, 4, 3, groups=4)
    return model


def groups_of(model, optimizer_settings):
    return build_param_groups(model.named_modules(), DEPTH, optimizer_settings)


def mmcv_groups(monkeypatch, model, **optimizer):
    """Name -> (rate, weight decay) as MMCV's default constructor sets them."""
    monkeypatch.setattr("mmcv.runner.optimizer.default_constructor.check_ops_exist", lambda: False)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, {"type": "AdamW", **optimizer}).param_groups
    return {name_of[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


def test_every_parameter_is_in_exactly_one_group(model):
    groups = groups_of(model, settings())
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_a_multiplier_that_no_parameter_has_is_told_of(model):
    names, head = [name for name, _ in model.named_parameters()], {"decode_head": (10.0, 1.0)}
    assert find_idle_multipliers(names, settings(multipliers={**head, "norm": (1.0, 0.0)})) == []
    (idle,) = find_idle_multipliers(names, settings(multipliers={**head, "nrom": (1.0, 0.0)}))
    assert "custom_keys.nrom does nothing" in idle and "Did you mean 'norm" in idle


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.cls_token", 0),
        ("backbone.pos_embed", 0),
        ("backbone.patch_embed.proj.bias", 0),
        ("backbone.blocks.0.attn.qkv.weight", 1),
        ("backbone.blocks.2.ls2.gamma", 3),
        ("backbone.norm.weight", 4),
        ("decode_head.conv_seg.weight", 4),
    ],
)
def test_layers_and_their_rates(model, name, layer):
    assert layer_id(name, DEPTH) == layer
    groups = by_name(groups_of(model, settings()))
    if name in groups:
        assert groups[name]["base_lr"] == pytest.approx(1e-3 * 0.5 ** (DEPTH + 1 - layer), rel=1e-12)


def test_weight_decay_exemptions(model):
    groups = by_name(groups_of(model, settings()))
    for name, group in groups.items():
        exempt = name.endswith(
            (".bias", "gamma", "norm.weight", "norm1.weight", "norm2.weight", "cls_token", "pos_embed")
        )
        assert group["weight_decay"] == (0.0 if exempt else 0.05), name


def test_embeddings_are_decayed_as_published_on_request(model):
    groups = by_name(groups_of(model, settings(decay_embeddings=True)))
    assert groups["backbone.pos_embed"]["weight_decay"] == 0.05
    assert groups["backbone.blocks.0.norm1.weight"]["weight_decay"] == 0.0


def test_the_longest_matching_multiplier_counts(model):
    multipliers = {"decode_head": (10.0, 0.5), "decode_head.conv_seg": (2.0, 1.0)}
    groups = by_name(groups_of(model, settings(layer_decay_rate=None, multipliers=multipliers)))
    assert groups["decode_head.conv_seg.weight"]["base_lr"] == pytest.approx(2e-3)
    assert groups["decode_head.norm.weight"]["base_lr"] == pytest.approx(1e-2)
    assert groups["backbone.blocks.0.mlp.fc1.weight"]["base_lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"weight_decay": 0.05},
        {
            "weight_decay": 0.05,
            "paramwise_cfg": {"custom_keys": {"norm": {"decay_mult": 0.0}, "head": {"lr_mult": 10}}},
        },
        {"weight_decay": 0.05, "paramwise_cfg": {"custom_keys": {"qkv": {"lr_mult": 2}, "0.a": {"lr_mult": 3}}}},
        {
            "weight_decay": 0.05,
            "paramwise_cfg": {"custom_keys": {"blocks.1": {"lr_mult": 2}, "attn.qkv": {"lr_mult": 3}}},
        },
        {"weight_decay": 0.05, "paramwise_cfg": {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0}},
        {
            "weight_decay": 0.05,
            "paramwise_cfg": {
                "bias_lr_mult": 2.0,
                "bias_decay_mult": 0.5,
                "norm_decay_mult": 0.25,
                "dwconv_decay_mult": 0.125,
                "bypass_duplicate": True,
                "custom_keys": {"blocks.1": {"lr_mult": 3}, "norm1": {"decay_mult": 0.75}},
            },
        },
    ],
    ids=["nothing", "decay", "norms and heads", "shares of a name", "keys of one length", "kinds", "kinds and names"],
)
def test_the_default_constructor_is_mmcvs(monkeypatch, model_with_layer_norms, optimizer):
    optimizer = {"lr": 1e-3, **optimizer}
    faults = Faults("config")
    groups = groups_of(model_with_layer_norms, read_optimizer(optimizer, DEPTH, faults))
    faults.raise_if_any()
    found = {name: (group["base_lr"], group["weight_decay"]) for name, group in by_name(groups).items()}
    assert found == mmcv_groups(monkeypatch, model_with_layer_norms, **optimizer)


def test_rms_norms_are_norms(model):
    kinds = KindMultipliers(norm_decay_mult=0.0)
    groups = by_name(groups_of(model, settings(layer_decay_rate=None, kinds=kinds)))
    exempt = {name for name, group in groups.items() if group["weight_decay"] == 0.0}
    assert {"backbone.blocks.0.norm1.weight", "decode_head.norm.weight", "decode_head.norm.bias"} <= exempt
    assert not {"backbone.blocks.0.attn.qkv.bias", "backbone.blocks.0.ls1.gamma"} & exempt


def module_with(**parameters):
    module = nn.Module()
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    return module


def test_frozen_parameters_are_left_out():
    frozen, trained = nn.Parameter(torch.zeros(2, 2), requires_grad=False), nn.Parameter(torch.zeros(2, 2))
    groups = build_param_groups([("backbone", module_with(a=frozen, b=trained))], DEPTH, settings())
    assert [group["names"] for group in groups] == [["backbone.b"]]


def test_a_shared_parameter_is_in_one_group():
    shared = nn.Parameter(torch.zeros(2, 2))
    twice = [("backbone", module_with(a=shared)), ("backbone.child", module_with(b=shared))]
    (group,) = build_param_groups(twice, DEPTH, settings())
    assert group["names"] == ["backbone.a"]


def test_the_shape_before_sharding_decides_about_decay():
    sharded = nn.Parameter(torch.zeros(0))
    sharded.ds_shape = torch.Size((4, 4))
    (group,) = build_param_groups([("backbone", module_with(x=sharded))], DEPTH, settings())
    assert group["weight_decay"] == 0.05


def test_table_shows_layers_rates_and_counts(model):
    table = format_groups(groups_of(model, settings()))
    assert "block 2" in table and "5.000e-04" in table and "heads" in table


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["backbone.pos_embed", "backbone.blocks.0.ls1.gamma"], "embeddings, block 0"),
        (["backbone.blocks.2.ls1.gamma", "backbone.blocks.0.ls1.gamma", "backbone.norm.bias"], "block 0, block 2, "),
        ([f"backbone.blocks.{i}.ls1.gamma" for i in (0, 1, 2)], "blocks 0-2"),
        (["backbone.norm.bias", "decode_head.norm.bias"], "final layers, heads"),
        (["auxiliary_heads.0.norm.bias"], "heads"),
    ],
)
def test_a_group_tells_which_layers_are_in_it(names, text):
    assert describe_layers(names, DEPTH).startswith(text)


@pytest.mark.parametrize(("rate", "decays"), [(None, [0.05]), (1.0, [0.0, 0.05])])
def test_layers_of_equal_rate_and_decay_share_a_group(model, rate, decays):
    groups = groups_of(model, settings(layer_decay_rate=rate))
    assert sorted(group["weight_decay"] for group in groups) == decays
    assert all(group["layers"] == f"embeddings, blocks 0-{DEPTH - 1}, heads" for group in groups)
