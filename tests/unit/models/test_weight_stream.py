from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ds_seg.models.weight_files import WeightFiles
from ds_seg.models.weight_stream import plan_writes, stream_weights

VALUES = {name: torch.randn(2, 3) for name in ("q", "k", "v", "b")}
SHARDS = {"1.safetensors": ["v", "b"], "2.safetensors": ["q", "k"]}
SOURCES = {"qkv": ("q", "k", "v"), "b": ("b",)}


@pytest.fixture
def files(tmp_path):
    """Four tensors in two shards; the parts of one parameter lie in both."""
    for shard, names in SHARDS.items():
        save_file({name: VALUES[name] for name in names}, tmp_path / shard)
    weight_map = {name: shard for shard, names in SHARDS.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return WeightFiles(tmp_path)


class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.b = nn.Parameter(torch.zeros(6, 3).bfloat16()), nn.Parameter(torch.zeros(2, 3))


def test_files_are_visited_once_and_parts_find_their_rows(files):
    writes = plan_writes(SOURCES, files)
    assert [write.target for write in writes] == ["qkv", "b", "qkv"]
    assert [[(piece.source, piece.rows) for piece in write.pieces] for write in writes] == [
        [("v", (4, 6))],
        [("b", None)],
        [("q", (0, 2)), ("k", (2, 4))],
    ]
    read = [files.entries[piece.source].file.name for write in writes for piece in write.pieces]
    assert read == ["1.safetensors"] * 2 + ["2.safetensors"] * 2


def test_values_arrive_in_the_dtype_of_the_parameter(files):
    target = Target()
    stream_weights(target, plan_writes(SOURCES, files), files, partitioned=False, progress=False)
    joined = torch.cat([VALUES[name] for name in SOURCES["qkv"]]).bfloat16()
    torch.testing.assert_close(target.qkv.data, joined, rtol=0, atol=0)
    torch.testing.assert_close(target.b.data, VALUES["b"], rtol=0, atol=0)


def test_a_bar_on_a_terminal_counts_bytes(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    stream_weights(Target(), plan_writes(SOURCES, files), files, partitioned=False, progress=True)
    shown = capsys.readouterr().err
    assert "loading weights" in shown
    assert f"/{sum(value.nbytes for value in VALUES.values()):.1f}" in shown


def test_a_log_file_gets_no_line_for_what_takes_a_moment(files, capsys):
    stream_weights(Target(), plan_writes(SOURCES, files), files, partitioned=False, progress=True)
    assert capsys.readouterr().err == ""
