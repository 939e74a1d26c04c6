from dataclasses import replace

import pytest
import torch

from ds_seg.checkpoint.model_weights import open_exported, open_modules
from ds_seg.checkpoint.round_trip import compare_logits
from ds_seg.errors import ExportError
from ds_seg.models import build_heads
from ds_seg.models.backbone_building import build_backbone
from tiny_export import MODELS, build, describe, export


def compare(description, source, exported, file_dtype, dtype):
    with torch.device("meta"):
        backbone = build_backbone(description.model)
    heads = build_heads(description.model)
    found = compare_logits(backbone, heads, source, exported, file_dtype=file_dtype, dtype=dtype)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_loses_nothing_has_the_same_logits(tmp_path, name, dtype):
    description = describe(name)
    source = export(tmp_path / "m.safetensors", description, dtype)
    found = compare(description, source, open_exported(tmp_path / "m.safetensors"), dtype, dtype)
    assert found.difference == 0 < found.largest and found.side_px == 16
    assert "differ by at most 0 " in found.describe()


def test_the_logits_are_those_of_the_whole_model(tmp_path):
    description = describe()
    backbone, heads = build(description)
    source = open_modules(backbone, heads)
    found = compare(description, source, source, torch.float32, torch.float32)
    image_13HW = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = heads.eval().predict(backbone.eval()(image_13HW), (16, 16))
    assert found.largest == wanted.abs().max()


def test_what_rounding_costs_is_measured_and_allowed(tmp_path):
    description = describe()
    source = export(tmp_path / "m.safetensors", description, torch.bfloat16)
    found = compare(description, source, open_exported(tmp_path / "m.safetensors"), torch.bfloat16, torch.float32)
    assert 1e-6 < found.difference / found.largest < 0.05  # measured: 2e-3


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
def test_a_changed_tensor_is_found(tmp_path, file_dtype):
    description = describe()
    source = export(tmp_path / "m.safetensors", description, file_dtype)
    exported = open_exported(tmp_path / "m.safetensors")
    read = exported.read
    wrong = replace(exported, read=lambda name: read(name) * (1.01 if name == "blocks.2.mlp.fc1.weight" else 1))
    with pytest.raises(ExportError, match=r"logits of the exported file are off by .* The file was not kept"):
        compare(description, source, wrong, file_dtype, torch.float32)


def test_a_changed_head_is_found_though_it_predicts_nothing(tmp_path):
    description = describe("one_auxiliary_head")
    source = export(tmp_path / "m.safetensors", description)
    exported = open_exported(tmp_path / "m.safetensors")
    name = "auxiliary_heads.0.conv_seg.bias"
    wrong = replace(exported, heads={**exported.heads, name: exported.heads[name] + 1})
    with pytest.raises(ExportError, match=r"other values than the checkpoint in auxiliary_heads\.0\.conv_seg\.bias\."):
        compare(description, source, wrong, torch.float32, torch.float32)
