"""Exports of checkpoints that two ranks wrote, read in this one process and compared bit by bit with what they held."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ds_seg.checkpoint import list_checkpoints
from ds_seg.checkpoint.description import describe_model_of
from ds_seg.checkpoint.export import write_export
from ds_seg.checkpoint.model_weights import open_checkpoint, open_exported
from ds_seg.checkpoint.round_trip import compare_logits
from ds_seg.checkpoint.saved_weights import SavedBackbone
from ds_seg.checkpoint.shards import MASTER
from ds_seg.checkpoint.training_state import read_state
from ds_seg.errors import CheckpointError
from ds_seg.models import build_heads
from ds_seg.models.backbone_building import build_backbone
from ranks import run_ranks

WORKER = Path(__file__).with_name("export_worker.py")
CASES = ("bf16", "averaged", "partly_frozen", "frozen")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    run_ranks(WORKER, 2, folder, timeout_s=300)
    return folder


def open_case(out, name):
    """The run, its backbone without weights, its heads, the weights in its checkpoint, and what they must be."""
    run = pickle.loads((out / name / "run.pickle").read_bytes())
    with torch.device("meta"):
        backbone = build_backbone(run.model)
    heads = build_heads(run.model)
    weights = open_checkpoint(list_checkpoints(out / name)[-1], backbone, heads)
    return run, backbone, heads, weights, torch.load(out / name / "weights.pt")


def collect(weights):
    return {f"backbone.{name}": weights.read(name).clone() for name in weights.shapes} | weights.heads


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_read_and_exported_bit_by_bit(out, name):
    run, backbone, heads, weights, wanted = open_case(out, name)
    assert weights.averaged == (name == "averaged")
    assert_same_bits(collect(weights), wanted)
    path = out / name / "model.safetensors"
    with write_export(path, "safetensors", weights, describe_model_of(run), torch.float32) as file:
        exported = open_exported(file)
        found = compare_logits(
            backbone,
            heads,
            weights,
            exported,
            file_dtype=torch.float32,
            dtype=torch.bfloat16 if run.bf16 else torch.float32,
        )
    assert found.difference == 0 < found.largest
    assert_same_bits(
        collect(open_exported(path)), {k: v.float() if v.is_floating_point() else v for k, v in wanted.items()}
    )


def test_the_masters_of_a_rank_lie_in_several_flat_tensors(out):
    folder = list_checkpoints(out / "bf16")[-1]
    saved = SavedBackbone(folder, read_state(folder))
    assert [len(saved._shards._flat(rank, MASTER)) > 1 for rank in range(2)] == [True, True]


def test_averages_differ_from_the_weights(out):
    folder = list_checkpoints(out / "averaged")[-1]
    saved = SavedBackbone(folder, read_state(folder))
    assert not torch.equal(saved.read("cls_token").flatten(), saved._shards.read("cls_token"))


def test_a_damaged_or_other_checkpoint_is_refused_before_anything_is_read(out, tmp_path):
    run, backbone, heads, _, _ = open_case(out, "bf16")
    folder = list_checkpoints(out / "bf16")[-1]
    with pytest.raises(CheckpointError, match=r"is of another model: backbone parameter 'norm\.weight' has shape none"):
        open_checkpoint(folder, build_backbone({"backbone": {**run.model.backbone, "output_norm": True}}), heads)
    shard = next((folder / "backbone").glob("*rank_1*_optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="has another checksum"):
        open_checkpoint(folder, backbone, heads)
