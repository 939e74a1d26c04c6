from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ds_seg import distributed
from ds_seg.checkpoint.averages import (
    SavedBackboneAverages,
    averages_file,
    load_averages,
    validate_backbone_averages,
)
from ds_seg.errors import CheckpointError

WHOLE = {"blocks.0.weight": torch.arange(7.0), "cls_token": torch.tensor([0.1])}


def make_ema(**backbone):
    """Stands for a rank's averages and remembers what it is told to load."""
    loaded = []
    return SimpleNamespace(backbone=backbone, load=lambda *parts: loaded.append(parts), loaded=loaded)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of three ranks; the last one's shard of a small parameter is nothing but padding."""
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts = {name: whole[rank * 3 : rank * 3 + 3].clone() for name, whole in WHOLE.items()}
        (tmp_path / averages_file()).parent.mkdir(exist_ok=True)
        save_file(parts, tmp_path / averages_file())
    return tmp_path


def test_whole_averages_are_put_together_in_the_order_of_ranks(folder):
    saved = SavedBackboneAverages(folder)
    assert saved.names == set(WHOLE)
    for name, whole in WHOLE.items():
        assert torch.equal(saved.read(name), whole)


def test_a_checkpoint_without_averages_has_no_names(tmp_path):
    assert SavedBackboneAverages(tmp_path).names == set()


def test_a_rank_loads_its_own_part_and_the_heads(folder, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    ema = make_ema(**{"blocks.0.weight": torch.zeros(3), "cls_token": torch.zeros(0)})
    validate_backbone_averages(folder, ema)
    load_averages(folder, ema, {"conv_seg.weight": torch.ones(2)})
    ((backbone, heads),) = ema.loaded
    assert torch.equal(backbone["blocks.0.weight"], torch.tensor([3.0, 4.0, 5.0])) and len(backbone["cls_token"]) == 0
    assert list(heads) == ["conv_seg.weight"]


@pytest.mark.parametrize(
    ("backbone", "text"),
    [
        (
            {"blocks.0.weight": 3},
            r"averages of 2 backbone parameters, and this run trains 1; 'cls_token' is in only one",
        ),
        ({"blocks.0.weight": 4, "cls_token": 1}, r"this run trains 2; 'blocks\.0\.weight' is in only .* or of another"),
        ({"blocks.0.weight": 3, "cls_token": 1, "pos_embed": 2}, r"'pos_embed' is .* Freeze the same parts as there"),
    ],
)
def test_averages_of_other_parameters_are_refused(folder, monkeypatch, backbone, text):
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    ema = make_ema(**{name: torch.zeros(size) for name, size in backbone.items()})
    with pytest.raises(CheckpointError, match=text):
        validate_backbone_averages(folder, ema)
