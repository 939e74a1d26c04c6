import pytest
import torch
from safetensors.torch import save_file

from ds_seg import distributed
from ds_seg.checkpoint.averages import SavedBackboneAverages, averages_file
from saved import list_in_manifest

WHOLE = {"blocks.0.weight": torch.arange(7.0), "cls_token": torch.tensor([0.1])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of three ranks; the last one's shard of a small parameter is nothing but padding."""
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts = {name: whole[rank * 3 : rank * 3 + 3].clone() for name, whole in WHOLE.items()}
        (tmp_path / averages_file()).parent.mkdir(exist_ok=True)
        save_file(parts, tmp_path / averages_file())
    list_in_manifest(tmp_path)
    return tmp_path


def test_whole_averages_are_put_together_in_the_order_of_ranks(folder):
    saved = SavedBackboneAverages(folder)
    assert saved.names == set(WHOLE)
    for name, whole in WHOLE.items():
        assert torch.equal(saved.read(name), whole)


def test_a_stray_file_is_not_read(folder):
    save_file({"cls_token": torch.ones(9)}, folder / "ema" / "rank_00003.safetensors")
    assert torch.equal(SavedBackboneAverages(folder).read("cls_token"), WHOLE["cls_token"])


def test_a_checkpoint_without_averages_has_no_names(tmp_path):
    list_in_manifest(tmp_path)
    assert SavedBackboneAverages(tmp_path).names == set()


def test_any_stretch_of_an_average_is_put_together(folder):
    saved = SavedBackboneAverages(folder)
    for name, whole in WHOLE.items():
        for start in range(8):
            for stop in range(start, 9):
                assert torch.equal(saved.read(name, start, stop), whole[start:stop]), (name, start, stop)
