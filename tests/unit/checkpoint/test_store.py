import pytest

from ds_seg.checkpoint import checkpoint_name, find_resume_point, list_checkpoints, resolve_checkpoint
from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.checkpoint.store import checkpoints_folder, drop_checkpoints_after, drop_leftovers, drop_old_checkpoints
from ds_seg.errors import CheckpointError


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


def test_auto_resumes_from_the_newest_complete_one_or_starts_anew(tmp_path):
    assert find_resume_point(tmp_path, "auto") is None
    make(tmp_path, ".step_000030.tmp")
    assert find_resume_point(tmp_path, "auto") is None
    make(tmp_path, "step_000010")
    newest = make(tmp_path, "step_000020")
    assert find_resume_point(tmp_path, "auto") == newest


def test_a_tag_or_a_folder_names_the_checkpoint(tmp_path):
    wanted = make(tmp_path, "step_000010")
    make(tmp_path, "step_000020")
    assert find_resume_point(tmp_path, "step_000010") == wanted
    assert find_resume_point(tmp_path / "other", str(wanted)) == wanted


def test_an_unknown_tag_is_refused_with_the_complete_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume step_000030: no complete checkpoint .* Complete ones: none\."):
        find_resume_point(tmp_path, "step_000030")
    make(tmp_path, "step_000010")
    make(tmp_path, "step_000030", complete=False)
    with pytest.raises(CheckpointError, match=r"Complete ones: step_000010\. Use one of them, or --resume auto\."):
        find_resume_point(tmp_path, "step_000030")


def test_a_checkpoint_argument_is_a_checkpoint_or_a_folder_that_holds_some(tmp_path):
    first, newest = make(tmp_path, "step_000010"), make(tmp_path, "step_000020")
    assert resolve_checkpoint(str(first)) == first
    assert resolve_checkpoint(str(tmp_path)) == newest
    assert resolve_checkpoint(str(checkpoints_folder(tmp_path))) == newest


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


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, checkpoint_name(step))
    drop_old_checkpoints(tmp_path, keep=2, best="step_000010", good_step=40)
    assert names(tmp_path) == ["step_000010", "step_000030", "step_000040"]
    drop_old_checkpoints(tmp_path, keep=1, best=None, good_step=40)
    assert names(tmp_path) == ["step_000040"]
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["step_000040"]


def test_rotation_keeps_the_newest_from_before_steps_that_were_not_finite(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, checkpoint_name(step))
    drop_old_checkpoints(tmp_path, keep=1, best=None, good_step=25)
    assert names(tmp_path) == ["step_000020", "step_000040"]


def test_a_rollback_removes_the_checkpoints_of_later_steps(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, checkpoint_name(step))
    drop_checkpoints_after(tmp_path, 20)
    assert names(tmp_path) == ["step_000010", "step_000020"]


def test_rotation_leaves_few_checkpoints_alone(tmp_path):
    make(tmp_path, "step_000010")
    drop_old_checkpoints(tmp_path, keep=2, best=None, good_step=10)
    assert names(tmp_path) == ["step_000010"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    make(tmp_path, "step_000010")
    make(tmp_path, ".step_000015.tmp", complete=False)
    make(tmp_path, ".step_000010.replaced")
    drop_leftovers(tmp_path)
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["step_000010"]
    drop_leftovers(tmp_path / "absent")
