import collections
import json
import math
import subprocess
import sys

import pytest
import torch

from ds_seg.checkpoint.shards import MASTER, SavedShards
from ds_seg.config import CONFIGS_ROOT
from ds_seg.errors import CheckpointError
from saved import list_in_manifest

SHAPES = {"cls_token": (1, 1, 5), "blocks.0.weight": (3, 4), "patch_embed.proj.bias": (7,)}
FROZEN = {"pos_embed": (2, 3)}
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
GROUP = {"rate_groups": [{"names": ["backbone.cls_token"], "base_lr": 0.1, "weight_decay": 0.0}], "params": [0]}


def shard(value, rank, ranks):
    part = math.ceil(value.numel() / ranks)
    padded = torch.cat([value.flatten(), torch.full((part * ranks - value.numel(),), torch.nan)])
    return padded[rank * part : (rank + 1) * part]


def write(folder, ranks, cuts, *, shapes=SHAPES, steps=(3.0,), stepped=True):
    """A trained backbone as DeepSpeed lays it out; `cuts` end a rank's flat tensors. Padding is not a number."""
    (folder / "backbone").mkdir()
    torch.manual_seed(0)
    whole = {kind: {name: torch.randn(shape) for name, shape in shapes.items()} for kind in KINDS}
    frozen = {name: torch.randn(shape) for name, shape in FROZEN.items()}
    counters = {"global_steps": 4, "skipped_steps": 1, "global_samples": 32}
    for rank in range(ranks):
        flat = {
            kind: [
                t.clone() for t in torch.cat([shard(v, rank, ranks) for v in whole[kind].values()]).tensor_split(cuts)
            ]
            for kind in KINDS
        }
        model = {
            "param_shapes": [collections.OrderedDict({name: torch.Size(shape) for name, shape in shapes.items()})],
            "frozen_param_shapes": {name: torch.Size(shape) for name, shape in FROZEN.items()},
            "frozen_param_fragments": {name: shard(value, rank, ranks) for name, value in frozen.items()},
            **counters,
        }
        moments = zip(flat["exp_avg"], flat["exp_avg_sq"], strict=True)
        state = {
            index: {"step": torch.tensor(steps[index % len(steps)]), "exp_avg": mean, "exp_avg_sq": square}
            for index, (mean, square) in enumerate(moments)
        }
        adam = {"state": state if stepped else {}, "param_groups": [GROUP]}
        optimizer = {"fp32_flat_groups": flat[MASTER], "optimizer_state_dict": adam}
        names = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]
        torch.save(model, folder / "backbone" / names[0])
        torch.save({"optimizer_state_dict": optimizer}, folder / "backbone" / names[1])
    list_in_manifest(folder)
    return whole, frozen


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
@pytest.mark.parametrize("cuts", [[], [2, 3]])
def test_any_stretch_of_anything_is_put_together_without_padding(tmp_path, ranks, cuts):
    whole, frozen = write(tmp_path, ranks, cuts)
    saved = SavedShards(tmp_path)
    for kind, values in whole.items():
        for name, value in values.items():
            for start in range(value.numel() + 2):
                for stop in range(start, value.numel() + 3):
                    assert torch.equal(saved.read(name, kind, start, stop), value.flatten()[start:stop])
    assert torch.equal(saved.read("pos_embed", MASTER, 1, 5), frozen["pos_embed"].flatten()[1:5])
    assert list(saved.trained) == list(SHAPES) and set(saved.numels) == set(SHAPES | FROZEN)


def test_stray_files_beside_those_of_the_manifest_are_not_read(tmp_path):
    whole, _ = write(tmp_path, 2, [])
    for path in sorted((tmp_path / "backbone").glob("*rank_0_*")):
        path.with_name(path.name.replace("rank_0_", "rank_2_")).write_bytes(path.read_bytes())
        path.with_name(f"old_{path.name}").write_bytes(b"")
    saved = SavedShards(tmp_path)
    for name, value in whole[MASTER].items():
        assert torch.equal(saved.read(name), value.flatten())


def test_what_was_counted_and_the_groups_are_read(tmp_path):
    write(tmp_path, 2, [3])
    saved = SavedShards(tmp_path)
    assert saved.counters == {"global_steps": 4, "skipped_steps": 1, "global_samples": 32}
    assert saved.optimizer_steps == 3 and saved.groups == [GROUP]


def test_an_optimizer_that_never_stepped_has_no_count(tmp_path):
    write(tmp_path, 2, [], stepped=False)
    assert SavedShards(tmp_path).optimizer_steps is None


def test_parts_that_stepped_unequally_are_refused(tmp_path):
    write(tmp_path, 1, [3], steps=(3.0, 4.0))
    with pytest.raises(CheckpointError, match=r"the optimizer's parts have stepped \[3, 4\] times"):
        _ = SavedShards(tmp_path).optimizer_steps


def test_a_rank_opens_only_the_files_that_hold_its_part(tmp_path):
    whole, _ = write(tmp_path, 6, [])
    for rank in (3, 4, 5):
        next((tmp_path / "backbone").glob(f"*rank_{rank}_*optim_states.pt")).write_bytes(b"")
    saved = SavedShards(tmp_path)
    weight = whole[MASTER]["blocks.0.weight"].flatten()
    assert torch.equal(saved.read("blocks.0.weight", MASTER, 0, 6), weight[:6])
    with pytest.raises(CheckpointError, match=r"rank_3_.*optim_states\.pt is not laid out as"):
        saved.read("blocks.0.weight", MASTER, 0, 7)


MEASURE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from process_memory import MemoryPeaks
from ds_seg.checkpoint.shards import SavedShards
part, own = 1024 * 1024 // 8, []
with MemoryPeaks() as peaks:
    saved = SavedShards(Path(sys.argv[1]))
    for name in saved.trained:
        own += [saved.read(name, kind, 2 * part, 3 * part) for kind in ("master", "exp_avg", "exp_avg_sq")]
    own_bytes = sum(value.numel() for value in own) * 4
print(json.dumps({"own": own_bytes} | peaks.added()))
"""


def test_a_part_of_a_large_checkpoint_takes_the_memory_of_that_part(tmp_path):
    """One rank of eight, of 240 MiB that three wrote: 30 MiB of its own, measured in a process of its own.

    It touches pages of two files. The system maps up to 2 MiB around each, 155 MiB here, which it shares with its page
    cache and takes back when it needs them.
    """
    write(tmp_path, 3, [5_000_000], shapes={f"blocks.{i}.weight": (1024, 1024) for i in range(20)})
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(CONFIGS_ROOT.parent / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    mib = {kind: added / 2**20 for kind, added in json.loads(done.stdout).items()}
    assert mib["own"] == 30
    assert mib["anonymous"] < 38, mib
    assert mib["file"] < 170, mib
