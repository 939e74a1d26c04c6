import collections

import pytest
import torch

from ds_seg import checkpoint
from ds_seg.checkpoint.saved_weights import SavedBackbone
from ds_seg.errors import CheckpointError
from saved import list_in_manifest

SHAPES = {"cls_token": [1, 1, 5], "pos_embed": [3, 4], "patch_embed.proj.bias": [7]}
FROZEN = {"blocks.0.weight": [2, 3]}
CONTENT = {"model": {"backbone": SHAPES | FROZEN}, "backbone_trained": True}


def shard(value, rank, ranks):
    part = -(-value.numel() // ranks)
    padded = torch.cat([value.flatten(), torch.zeros(part * ranks - value.numel())])
    return padded[rank * part : (rank + 1) * part]


def write(folder, ranks, cuts, **model_state):
    """Shards as DeepSpeed lays them out; a rank's masters are cut into flat tensors at any places."""
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, shape in (SHAPES | FROZEN).items()}
    (folder / "backbone").mkdir()
    for rank in range(ranks):
        masters = torch.cat([shard(whole[name], rank, ranks) for name in SHAPES])
        groups = [part.clone() for part in masters.tensor_split(cuts)]
        shapes = [collections.OrderedDict({name: torch.Size(shape)}) for name, shape in SHAPES.items()]
        state = {
            "param_shapes": shapes,
            "frozen_param_shapes": {name: torch.Size(shape) for name, shape in FROZEN.items()},
            "frozen_param_fragments": {name: shard(whole[name], rank, ranks).bfloat16() for name in FROZEN},
            **model_state,
        }
        torch.save(state, folder / "backbone" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": groups}}
        torch.save(optimizer, folder / "backbone" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    list_in_manifest(folder)
    return whole


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
@pytest.mark.parametrize("cuts", [[], [1], [2, 3], [1, 2, 3]])
def test_parameters_are_put_together_from_all_ranks(tmp_path, ranks, cuts):
    whole = write(tmp_path, ranks, cuts)
    saved = SavedBackbone(tmp_path, CONTENT)
    assert saved.shapes == {name: tuple(shape) for name, shape in (SHAPES | FROZEN).items()}
    for name in SHAPES:
        assert torch.equal(saved.read(name), whole[name])
    assert torch.equal(saved.read("blocks.0.weight"), whole["blocks.0.weight"].bfloat16())


def test_a_rank_that_is_not_there(tmp_path):
    write(tmp_path, 2, [])
    next((tmp_path / "backbone").glob("*rank_1*model_states.pt")).unlink()
    list_in_manifest(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"backbone is not laid out as .* \(1 ranks, 2 optimizers\)\. Install the"
    ):
        SavedBackbone(tmp_path, CONTENT)


def test_fewer_masters_than_parameters(tmp_path):
    write(tmp_path, 2, [], param_shapes=[{"cls_token": torch.Size([1, 1, 99])}])
    with pytest.raises(CheckpointError, match=r"optim_states\.pt is not laid out .* \(13 of 50 masters a rank\)"):
        SavedBackbone(tmp_path, CONTENT).read("cls_token")


def test_another_layout(tmp_path):
    write(tmp_path, 1, [], param_shapes=None)
    with pytest.raises(CheckpointError, match=r"not laid out as DeepSpeed 0\.19\.8 lays out"):
        SavedBackbone(tmp_path, CONTENT)


def test_nothing_but_known_types_is_unpickled(tmp_path):
    write(tmp_path, 1, [], hook=collections.ChainMap())
    with pytest.raises(CheckpointError, match=r"model_states\.pt is not laid out .*Weights only load failed"):
        SavedBackbone(tmp_path, CONTENT)


def test_the_room_offers_what_it_names():
    assert {name for name in checkpoint.__all__ if not hasattr(checkpoint, name)} == set()
    with pytest.raises(AttributeError, match=r"module 'ds_seg\.checkpoint' has no attribute 'load_checkpoint'"):
        _ = checkpoint.load_checkpoint
