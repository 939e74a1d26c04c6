import pickle

import pytest
import torch

from ds_seg.checkpoint import choose_resume_point
from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.checkpoint.store import LATEST, checkpoints_folder
from ds_seg.errors import CheckpointError
from saved import make_checkpoint

SHARD, OTHER = "backbone/shard.pt", "backbone/other.pt"


def flip_bit(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARD).write_bytes(content)


def truncate(folder, name=SHARD):
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def swap(folder):
    """Exchange the shard with that of another checkpoint, whole and of the same size."""
    other = folder.parent / "step_000010" / SHARD
    mine, others = (folder / SHARD).read_bytes(), other.read_bytes()
    assert len(mine) == len(others) and mine != others
    (folder / SHARD).write_bytes(others)


DAMAGES = {
    "flipped bit": (flip_bit, "shard.pt has another checksum"),
    "truncated": (truncate, "shard.pt has .* bytes, want"),
    "missing": (lambda folder: (folder / SHARD).unlink(), "shard.pt is missing"),
    "swapped": (swap, "shard.pt has another checksum"),
    "half a manifest": (lambda folder: truncate(folder, MANIFEST), "manifest.json can't be read"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
}


@pytest.fixture
def warnings():
    return []


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_falls_back_with_a_line_for_each_damaged_one_and_a_tag_is_refused(tmp_path, warnings, damage):
    spoil, text = DAMAGES[damage]
    folders = [make_checkpoint(tmp_path, step, keep=9) for step in (10, 20, 30)]
    for folder in folders[1:]:
        spoil(folder)
    assert choose_resume_point(tmp_path, "auto", warnings.append) == folders[0]
    assert len(warnings) == 2 and "step_000030" in warnings[0] and "step_000020" in warnings[1]
    for tag in ("step_000030", "latest", str(folders[2])):
        with pytest.raises(CheckpointError, match=rf"no complete checkpoint|step_000030.*{text}"):
            choose_resume_point(tmp_path, tag, pytest.fail)


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_does_not_start_anew_where_checkpoints_are_damaged(tmp_path, warnings, damage):
    make_checkpoint(tmp_path, 10)
    folder = make_checkpoint(tmp_path, 20, keep=1)
    DAMAGES[damage][0](folder) if damage != "swapped" else flip_bit(folder)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is complete; .*without --resume"):
        choose_resume_point(tmp_path, "auto", warnings.append)
    assert len(warnings) == 1


def test_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert choose_resume_point(tmp_path / "absent", "auto", pytest.fail) is None
    (checkpoints_folder(tmp_path) / ".step_000010.tmp").mkdir(parents=True)
    assert choose_resume_point(tmp_path, "auto", pytest.fail) is None


def test_auto_needs_no_latest_and_minds_no_strangers(tmp_path):
    make_checkpoint(tmp_path, 10)
    newest = make_checkpoint(tmp_path, 20)
    for text in ("step_000010", "step_000099", "", "\0"):
        (checkpoints_folder(tmp_path) / LATEST).write_text(text)
        assert choose_resume_point(tmp_path, "auto", pytest.fail) == newest
    (checkpoints_folder(tmp_path) / LATEST).unlink()
    (newest / "notes.txt").write_text("mine")
    (checkpoints_folder(tmp_path) / ".step_000030.tmp").mkdir()
    (checkpoints_folder(tmp_path) / "step_final").mkdir()
    assert choose_resume_point(tmp_path, "auto", pytest.fail) == newest


def test_nothing_is_unpickled_on_the_way(tmp_path, warnings, monkeypatch):
    for step in (10, 20):
        make_checkpoint(tmp_path, step)
    flip_bit(checkpoints_folder(tmp_path) / "step_000020")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *_args, **_options: pytest.fail("unpickled"))
    assert choose_resume_point(tmp_path, "auto", warnings.append).name == "step_000010"
