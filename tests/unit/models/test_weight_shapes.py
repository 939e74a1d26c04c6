from __future__ import annotations

import pytest
import torch

from ds_seg.models import InternViT
from ds_seg.models.weight_shapes import find_fitting_configs, measure_image_px, measure_shape

SIX_B = {"embed_dim": 3200, "num_heads": 25, "qkv_bias": False, "qk_normalization": True, "norm": "rms"}
M300 = {"embed_dim": 1024, "num_heads": 16, "qkv_bias": True, "qk_normalization": False, "norm": "layer", "depth": 24}


def list_shapes(img_size=224, **arguments):
    with torch.device("meta"):
        model = InternViT(img_size=img_size, out_indices=[0], **arguments)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "fitting"),
    [
        ({**SIX_B, "depth": 48, "img_size": 224}, {"internvit6b_224"}),
        ({**SIX_B, "depth": 45, "img_size": 448}, {"internvit6b_448"}),
        ({**M300, "img_size": 448}, {"internvit300m_448"}),
    ],
)
def test_releases_are_told_by_their_weights(arguments, fitting):
    found = find_fitting_configs(list_shapes(**arguments))
    assert {f"ds_configs/models/{stem}.py" for stem in fitting} <= set(found)
    others = find_fitting_configs(list_shapes(**{**arguments, "depth": 47}))
    assert others == []


def test_another_image_size_still_finds_the_network():
    at_own_size = find_fitting_configs(list_shapes(**SIX_B, depth=48, img_size=224))
    elsewhere = find_fitting_configs(list_shapes(**SIX_B, depth=48, img_size=504))
    assert set(at_own_size) <= set(elsewhere)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"depth": 3}, "depth is 2 in the file and 3 in the config"),
        ({"embed_dim": 8}, "embed_dim is 16 in the file and 8 in the config"),
        ({"mlp_ratio": 2}, "mlp_ratio is 4.0 in the file and 2.0 in the config"),
        ({"in_chans": 1}, "in_chans is 3 in the file and 1 in the config"),
        ({"norm": "layer"}, "norm is rms in the file and layer in the config"),
        ({"qkv_bias": True}, "qkv_bias is False in the file and True in the config"),
        ({"qk_normalization": False}, "qk_normalization is True in the file and False in the config"),
        ({"init_values": None}, "init_values is True in the file and False in the config"),
        ({"patch_size": 8}, None),
    ],
)
def test_differences_are_named_as_arguments(change, difference):
    tiny = {"embed_dim": 16, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16}
    file, config = measure_shape(list_shapes(**tiny)), measure_shape(list_shapes(**{**tiny, **change}))
    assert file.find_differences(config) == ([difference] if difference else [])


def test_what_is_no_network_has_no_shape():
    shapes = list_shapes(embed_dim=16, num_heads=2, depth=1, patch_size=4, img_size=16)
    assert measure_image_px(shapes) == 16
    assert measure_image_px({**shapes, "pos_embed": (1, 12, 16)}) is None
    del shapes["patch_embed.proj.weight"]
    assert measure_shape(shapes) is None
    assert measure_image_px(shapes) is None
