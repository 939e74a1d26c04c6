import errno
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch

from ds_seg import files
from ds_seg.checkpoint.manifest import read_manifest, verify_files
from ds_seg.checkpoint.store import BEST, LATEST, checkpoints_folder
from ds_seg.checkpoint.write import commit, leaving_nothing, list_files, prepare_folder, validate_space, write_files
from ds_seg.errors import CheckpointError
from saved import describe_save, make_checkpoint, make_files, read_text


def names(work_dir):
    return sorted(path.name for path in checkpoints_folder(work_dir).iterdir())


def test_a_checkpoint_has_its_files_its_manifest_and_its_pointers(tmp_path):
    folder = make_checkpoint(tmp_path, 10, best="step_000010", world_size=4, config_digest="c0", versions={"a": "1"})
    assert names(tmp_path) == [BEST, LATEST, "step_000010"]
    assert (checkpoints_folder(tmp_path) / LATEST).read_text() == "step_000010\n"
    assert list_files(folder) == sorted([*make_files(""), "manifest.json"])
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.config_digest, manifest.versions) == (10, 4, "c0", {"a": "1"})
    assert torch.load(folder / "backbone" / "shard.pt")["masters"].tolist() == [11.0] * 64
    verify_files(folder, 0, 1)


def test_files_that_were_there_already_are_summed_up_too(tmp_path):
    save = describe_save(tmp_path, 10)
    prepare_folder(save)
    (save.temporary / "script.py").write_text("pass")
    commit(save, write_files(save, make_files("x"), list_files(save.temporary)))
    assert read_manifest(save.final).files["script.py"]["bytes"] == 4


def test_a_link_keeps_the_checksum_of_what_was_written_first(tmp_path):
    source = make_checkpoint(tmp_path, 10) / "state.json"
    source.write_text("damaged now")
    save = describe_save(tmp_path, 20)
    prepare_folder(save)
    linked = commit(save, write_files(save, {"state.json": source}, [])) / "state.json"
    assert linked.stat().st_ino == source.stat().st_ino
    with pytest.raises(CheckpointError, match=r"step_000020 is damaged: state\.json has another checksum"):
        verify_files(linked.parent, 0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda path: path.unlink(), "is missing"), (lambda path: path.write_text("half"), "has 4 bytes, want")],
)
def test_files_that_rank_0_does_not_see_make_no_checkpoint(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(files, "_SHOWN_AFTER_S", 0.0)
    older = make_checkpoint(tmp_path, 10)
    save, before = describe_save(tmp_path, 20), names(tmp_path)
    text = (
        rf"step_000020 is not complete: rank 0 does not see 1 of its 3 files .* the first, backbone/shard\.pt {words}.*"
        r"choose a --work-dir on a file system that all nodes share\."
    )
    with pytest.raises(CheckpointError, match=text), leaving_nothing(save):
        prepare_folder(save)
        entries = write_files(save, make_files("new"), [])
        change(save.temporary / "backbone" / "shard.pt")
        commit(save, entries)
    assert names(tmp_path) == before
    verify_files(older, 0, 1)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 10)
    save, before = describe_save(tmp_path, 20), names(tmp_path)
    usage = namedtuple("usage", "free")
    with leaving_nothing(save):
        prepare_folder(save)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage((5 << 30) + (2 << 16)))
        validate_space(save, 5 << 30, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(5 << 30))
    text = r"step_000020 needs 5\.00 GiB, and 5\.00 GiB are free there\. Nothing .* older .* are complete\. Make room"
    with pytest.raises(CheckpointError, match=text), leaving_nothing(save):
        validate_space(save, 5 << 30, 2)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["backbone/shard.pt", "ema/rank_00000.safetensors", "state.json"])
def test_a_disk_that_refuses_leaves_the_older_checkpoint_and_nothing_else(tmp_path, name):
    """A limit of the process on the size of files stands for a full disk: both refuse in the midst of a write."""
    older = make_checkpoint(tmp_path, 10)
    save, before = describe_save(tmp_path, 20), names(tmp_path)
    big = {"a": torch.zeros(1 << 18)} if name != "state.json" else "x" * (1 << 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = r"step_000020 could not be written: .*File too large.*older checkpoints are complete\. Make room"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        with pytest.raises(CheckpointError, match=text), leaving_nothing(save):
            prepare_folder(save)
            write_files(save, make_files("new") | {name: big}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == before
    verify_files(older, 0, 1)


def test_a_fault_of_ours_is_not_blamed_on_the_disk(tmp_path):
    save = describe_save(tmp_path, 10)
    prepare_folder(save)

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError):
        write_files(save, {"a.pt": {"a": Unpicklable()}}, [])


def test_a_folder_that_can_not_be_made(tmp_path):
    checkpoints_folder(tmp_path).write_text("")
    with pytest.raises(CheckpointError, match=r"step_000010 could not be written: .*choose another --work-dir"):
        prepare_folder(describe_save(tmp_path, 10))


def test_a_save_on_top_of_one_of_the_same_name_replaces_it(tmp_path):
    make_checkpoint(tmp_path, 10, text="old")
    folder = make_checkpoint(tmp_path, 10, text="new")
    assert read_text(folder) == "new" and names(tmp_path) == [LATEST, "step_000010"]
    assert [path.name for path in (folder / "ema").iterdir()] == ["rank_00000.safetensors"]


def test_where_files_can_not_be_linked_they_are_copied(tmp_path, monkeypatch):
    def refuse(*_paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    source = make_checkpoint(tmp_path, 10) / "state.json"
    save = describe_save(tmp_path, 20)
    prepare_folder(save)
    copied = commit(save, write_files(save, {"state.json": source}, [])) / "state.json"
    assert copied.stat().st_ino != source.stat().st_ino
    verify_files(copied.parent, 0, 1)
