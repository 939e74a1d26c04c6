import pytest

from ds_seg.checkpoint import checkpoint_name, list_checkpoints, resolve_checkpoint, resolve_weights
from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.checkpoint.store import (
    BEST,
    LATEST,
    checkpoints_folder,
    drop_checkpoints_after,
    drop_leftovers,
    drop_old_checkpoints,
    find_checkpoint,
    list_folders,
)
from ds_seg.errors import CheckpointError, WeightsError


def make(work_dir, name, complete=True):
    folder = checkpoints_folder(work_dir) / name
    folder.mkdir(parents=True)
    (folder / "heads.pt").write_bytes(b"x")
    if complete:
        (folder / MANIFEST).write_text("{}")
    return folder


def names(work_dir):
    return [path.name for path in list_checkpoints(work_dir)]


def test_complete_checkpoints_are_listed_by_step_and_incomplete_ones_are_not(tmp_path):
    for step in (1000000, 20, 999999, 3):
        make(tmp_path, checkpoint_name(step))
    make(tmp_path, ".step_000030.tmp")
    make(tmp_path, "step_000040", complete=False)
    assert names(tmp_path) == ["step_000003", "step_000020", "step_999999", "step_1000000"]


def test_a_work_dir_without_checkpoints_lists_none(tmp_path):
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "absent") == []


def test_folders_are_listed_by_name_alone(tmp_path):
    make(tmp_path, "step_000010", complete=False)
    make(tmp_path, "step_000020")
    for name in (".step_000030.tmp", ".step_000005.dropped", "step_final", ".step_000020.replaced"):
        make(tmp_path, name)
    assert [path.name for path in list_folders(tmp_path)] == ["step_000010", "step_000020"]


def test_a_checkpoint_whose_successor_never_came_still_counts(tmp_path):
    replaced = make(tmp_path, ".step_000020.replaced")
    make(tmp_path, ".step_000020.tmp")
    folder = checkpoints_folder(tmp_path)
    (folder / LATEST).write_text("step_000020\n")
    assert list_checkpoints(tmp_path) == [replaced]
    for given in (tmp_path, folder / "step_000020", folder / LATEST):
        assert resolve_checkpoint(str(given)) == replaced
    drop_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, "step_000020"]


def test_a_successor_counts_in_place_of_the_one_it_replaced(tmp_path):
    both = ["step_000010", ".step_000010.replaced"]
    for name in [*both, *(name.replace("10", "20") for name in reversed(both))]:  # no order of a folder's names helps
        make(tmp_path, name)
    assert names(tmp_path) == ["step_000010", "step_000020"]


def test_a_tag_or_a_folder_names_the_checkpoint(tmp_path):
    wanted = make(tmp_path, "step_000010")
    make(tmp_path, "step_000020")
    assert find_checkpoint(tmp_path, "step_000010") == wanted
    assert find_checkpoint(tmp_path / "other", str(wanted)) == wanted


@pytest.mark.parametrize(("folder", "tag"), [("checkpoints", "step_000010"), ("checkpoints/step_000010", ".")])
def test_a_relative_path_names_a_checkpoint_with_its_work_dir(tmp_path, monkeypatch, folder, tag):
    wanted = make(tmp_path, "step_000010")
    monkeypatch.chdir(tmp_path / folder)
    assert find_checkpoint(tmp_path / "other", tag) == wanted


@pytest.mark.parametrize("name", [LATEST, BEST])
def test_latest_and_best_name_checkpoints(tmp_path, name):
    wanted, pointer = make(tmp_path, "step_000010"), checkpoints_folder(tmp_path) / name
    pointer.write_text("step_000010\n")
    make(tmp_path, "step_000020")
    assert (
        find_checkpoint(tmp_path, name) == resolve_checkpoint(str(pointer)) == resolve_weights(str(pointer)) == wanted
    )
    for wrong in ("step_000030", "", "../step_000010", "\0"):
        pointer.write_text(wrong)
        for resolve in (lambda: find_checkpoint(tmp_path, name), lambda: resolve_weights(str(pointer))):
            with pytest.raises(CheckpointError, match=rf"{name} names the checkpoint .*, which is not there\."):
                resolve()


def test_an_unknown_tag_is_refused_with_the_complete_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume step_000030: no complete checkpoint .* Complete ones: none\."):
        find_checkpoint(tmp_path, "step_000030")
    make(tmp_path, "step_000010")
    make(tmp_path, "step_000030", complete=False)
    with pytest.raises(CheckpointError, match=r"Complete ones: step_000010\. Use one of them, or --resume auto\."):
        find_checkpoint(tmp_path, "step_000030")


def test_a_checkpoint_argument_is_a_checkpoint_or_a_folder_that_holds_some(tmp_path):
    first, newest = make(tmp_path, "step_000010"), make(tmp_path, "step_000020")
    assert resolve_checkpoint(str(first)) == first
    assert resolve_checkpoint(str(tmp_path)) == newest
    assert resolve_checkpoint(str(checkpoints_folder(tmp_path))) == newest


def test_an_older_checkpoint_does_not_stand_in_for_a_damaged_one(tmp_path):
    first = make(tmp_path, "step_000010")
    make(tmp_path, "step_000020", complete=False)
    with pytest.raises(CheckpointError, match=rf"step_000020, is damaged: .* is missing\. Name .*, such as {first}\."):
        resolve_checkpoint(str(tmp_path))
    assert resolve_checkpoint(str(first)) == first


def test_a_work_dir_stands_for_its_checkpoint_also_with_weights_in_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert resolve_weights(str(tmp_path)) == tmp_path
    newest = make(tmp_path, "step_000010")
    assert resolve_weights(str(tmp_path)) == newest


@pytest.mark.parametrize("given", ["open-mmlab://resnet50_v1c", "https://example.org/a.pth"])
def test_addresses_are_no_weights(given):
    with pytest.raises(WeightsError, match=rf"'{given}' is an address, .* write model=dict\(pretrained=None\)"):
        resolve_weights(given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("absent", "absent' does not exist"),
        ("checkpoints/step_000030", "step_000030' holds no complete checkpoint"),
        ("empty", "empty' holds no complete checkpoint. Name a folder like WORK_DIR/checkpoints/step_000100"),
    ],
)
def test_a_checkpoint_argument_that_names_none_is_refused(tmp_path, given, text):
    make(tmp_path, "step_000010")
    make(tmp_path, "step_000030", complete=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=text):
        resolve_checkpoint(str(tmp_path / given))


def drop(work_dir, keep, every_steps=None, needed=(), good_step=10**6):
    drop_old_checkpoints(work_dir, keep, every_steps, needed, good_step)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, checkpoint_name(step))
    drop(tmp_path, 2, needed=("step_000010", None))
    assert names(tmp_path) == ["step_000010", "step_000030", "step_000040"]
    drop(tmp_path, -1)
    assert len(names(tmp_path)) == 3
    drop(tmp_path, 1)
    assert names(tmp_path) == ["step_000040"]
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["step_000040"]


def test_rotation_keeps_the_newest_from_before_steps_that_were_not_finite(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, checkpoint_name(step))
    drop(tmp_path, 1, good_step=25)
    assert names(tmp_path) == ["step_000020", "step_000040"]


def test_a_rollback_removes_the_checkpoints_of_later_steps(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, checkpoint_name(step))
    drop_checkpoints_after(tmp_path, 20, best="step_000010")
    assert names(tmp_path) == ["step_000010", "step_000020"]
    assert find_checkpoint(tmp_path, LATEST).name == "step_000020"
    assert find_checkpoint(tmp_path, BEST).name == "step_000010"
    drop_checkpoints_after(tmp_path, 10, best=None)
    assert find_checkpoint(tmp_path, LATEST).name == "step_000010"
    assert not (checkpoints_folder(tmp_path) / BEST).exists()


def test_rotation_keeps_every_so_many_steps(tmp_path):
    for step in range(10, 80, 10):
        make(tmp_path, checkpoint_name(step))
    drop(tmp_path, 1, every_steps=30)
    assert names(tmp_path) == ["step_000030", "step_000060", "step_000070"]


def test_rotation_keeps_what_was_just_saved_below_older_ones_of_higher_steps(tmp_path):
    for step in (10, 100, 200):
        make(tmp_path, checkpoint_name(step))
    drop(tmp_path, 1, needed=("step_000010", None))
    assert names(tmp_path) == ["step_000010", "step_000200"]


def test_rotation_leaves_few_checkpoints_alone(tmp_path):
    make(tmp_path, "step_000010")
    drop(tmp_path, 2)
    assert names(tmp_path) == ["step_000010"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    make(tmp_path, "step_000010")
    make(tmp_path, ".step_000015.tmp", complete=False)
    make(tmp_path, ".step_000005.dropped", complete=False)
    make(tmp_path, ".step_000010.replaced")
    drop_leftovers(tmp_path)
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["step_000010"]
    drop_leftovers(tmp_path / "absent")
