import json
from dataclasses import replace

import pytest

from ds_seg.checkpoint.manifest import MANIFEST, Manifest, read_manifest, seal_files, verify_files, write_manifest
from ds_seg.errors import CheckpointError

FILES = {"a.pt": b"abcdef", "backbone/shard_0.pt": b"0" * 100, "backbone/shard_1.pt": b"1" * 100, "state.json": b"{}"}


@pytest.fixture
def folder(tmp_path):
    """A complete checkpoint."""
    folder = tmp_path / "checkpoints" / "step_000010"
    (folder / "backbone").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, Manifest(10, 2, "c0ffee", {"torch": "2.13.0"}, seal_files(folder, FILES)))
    return folder


def verify_all(folder, world_size):
    for rank in range(world_size):
        verify_files(folder, rank, world_size)


def test_manifest_lists_every_file_with_its_size_and_checksum(folder):
    manifest = read_manifest(folder)
    assert set(manifest.files) == set(FILES)
    digest = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"  # of "abcdef", as sha256sum prints it
    assert manifest.files["a.pt"] == {"bytes": 6, "sha256": digest}
    assert replace(manifest, files={}) == Manifest(10, 2, "c0ffee", {"torch": "2.13.0"}, {})


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_a_whole_checkpoint_is_accepted_on_any_world_size(folder, world_size):
    verify_all(folder, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 7])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found_by_exactly_one_rank(folder, name, world_size):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    found = 0
    for rank in range(world_size):
        try:
            verify_files(folder, rank, world_size)
        except CheckpointError as error:
            found += 1
            assert f"{name} has another checksum" in str(error)
    assert found == 1


def test_every_damaged_file_of_a_share_is_named(folder):
    shards = [folder / "backbone" / f"shard_{index}.pt" for index in range(2)]
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, reversed(contents), strict=True):
        shard.write_bytes(content)
    text = r"damaged: backbone/shard_0\.pt has another checksum; backbone/shard_1\.pt has another checksum\."
    with pytest.raises(CheckpointError, match=text):
        verify_all(folder, 1)


def test_a_file_that_can_not_be_read_is_named(folder):
    (folder / "a.pt").unlink()
    (folder / "a.pt").symlink_to("a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt can't be read \(Too many levels of symbolic links\)"):
        verify_all(folder, 1)


def test_other_files_do_not_matter(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "backbone" / "shard_2.pt").write_text("not a shard")
    verify_all(folder, 2)


def test_a_truncated_file_is_named_with_both_sizes(folder):
    (folder / "a.pt").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"is damaged: a\.pt has 3 bytes, want 6\."):
        verify_all(folder, 1)


def test_a_missing_file_is_named_and_other_checkpoints_are_offered(folder):
    (folder / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"state\.json is missing\. There is no other checkpoint beside it: start over\."
    ):
        verify_all(folder, 1)
    for step in (5, 20):
        (folder.parent / f"step_{step:06d}").mkdir()
    with pytest.raises(CheckpointError, match=r"state\.json is missing\. Use another one: step_000005, step_000020\."):
        verify_all(folder, 1)


def test_a_folder_without_manifest_is_no_checkpoint(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step_000010 is not a ds_seg checkpoint: it has no manifest\.json"):
        verify_all(folder, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace('"step": 10', '"step": 11'),
        lambda content: content.replace('"bytes": 6', '"bytes": 7'),
        lambda content: content.replace("digest", "digits"),
        lambda content: "[1]",
        lambda content: "\ufffd\x00",
    ],
)
def test_a_manifest_that_can_not_be_read_is_named(folder, damage):
    content = (folder / MANIFEST).read_text()
    assert damage(content) != content
    (folder / MANIFEST).write_text(damage(content))
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json can't be read"):
        verify_all(folder, 2)


def test_manifest_is_plain_json(folder):
    assert json.loads((folder / MANIFEST).read_text())["files"]["state.json"]["bytes"] == 2
