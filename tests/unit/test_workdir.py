import errno
import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ds_seg import workdir
from ds_seg.checkpoint import TrainingState, list_checkpoints
from ds_seg.config import RunOptions, build_run_config
from ds_seg.errors import UserError
from saved import make_checkpoint


def run_in(folder, **options):
    return build_run_config(RunOptions("demo", work_dir=str(folder), **options), 2)


def test_a_fresh_work_dir_is_described(tmp_path):
    run = run_in(tmp_path / "run")
    assert workdir.find_resume_point(run) is None and not run.work_dir.exists()
    workdir.open_work_dir(run, TrainingState(), None)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoints", "config.py", "deepspeed.json", "environment.json"}
    again = build_run_config(RunOptions(str(tmp_path / "run" / "config.py")), 2)
    assert again.optimizer == run_in(tmp_path).optimizer


def test_the_command_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.sys, "argv", ["ds-seg", "train", "demo", "--work-dir", "a b"])
    assert workdir.describe_environment(run_in(tmp_path))["command"] == "ds-seg train demo --work-dir 'a b'"


def test_a_package_that_is_not_installed_is_recorded_as_such(tmp_path, monkeypatch):
    """opencv-python-headless may be there in its place."""

    def version(name):
        if name == "opencv-python":
            raise PackageNotFoundError(name)
        return "4.9"

    monkeypatch.setattr("ds_seg.versions.version", version)
    packages = workdir.describe_environment(run_in(tmp_path))["packages"]
    assert packages["opencv-python"] == "not installed" and packages["opencv-python-headless"] == "4.9"


def test_an_earlier_run_is_set_aside_and_not_lost(tmp_path, capsys):
    workdir.open_work_dir(run_in(tmp_path, cfg_options={"optimizer.lr": 0.123}), TrainingState(), None)
    make_checkpoint(tmp_path, 5)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "loss_curve.png").write_bytes(b"")
    described = ("config.py", "deepspeed.json", "environment.json", "loss_curve.png")
    before = {name: (tmp_path / name).read_bytes() for name in described}
    assert workdir.find_resume_point(run_in(tmp_path)) is None
    assert not (tmp_path / "earlier-1").exists()  # a start may still fail
    workdir.open_work_dir(run_in(tmp_path), TrainingState(), None)
    assert before == {name: (tmp_path / "earlier-1" / name).read_bytes() for name in described}
    assert b"0.123" in before["config.py"] and b"0.123" not in (tmp_path / "config.py").read_bytes()
    assert not (tmp_path / "loss_curve.png").exists()
    assert (tmp_path / "earlier-1" / "checkpoints" / "step_000005").is_dir()
    assert (tmp_path / "earlier-1" / "summary.json").is_file() and not (tmp_path / "summary.json").exists()
    assert "earlier-1 (--resume auto would have gone on with it)" in capsys.readouterr().out
    make_checkpoint(tmp_path, 7)
    workdir.open_work_dir(run_in(tmp_path), TrainingState(), None)
    assert (tmp_path / "earlier-2" / "checkpoints" / "step_000007").is_dir()


@pytest.mark.parametrize("what", ["link", "mount", "other disk"])
def test_checkpoints_on_another_disk_stay_there_when_they_are_set_aside(tmp_path, monkeypatch, what):
    work_dir, checkpoints, disk = tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "disk"
    work_dir.mkdir()
    (checkpoints if what == "mount" else disk).mkdir()
    if what != "mount":
        checkpoints.symlink_to("../disk")
    rename = Path.rename

    def rename_on_one_disk(path, target):
        if what == "mount" and path == checkpoints:
            raise OSError(errno.EBUSY, "busy")
        if checkpoints in path.parents and checkpoints not in target.parents:
            raise OSError(errno.EXDEV, "another disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_on_one_disk)
    for number in (1, 2):
        kept = [make_checkpoint(work_dir, step) for step in (3, 6)]
        resume_from = kept[0] if what == "other disk" else None
        workdir.open_work_dir(run_in(work_dir), TrainingState(step=3), resume_from)
        aside, inside = work_dir / f"earlier-{number}", checkpoints / f"earlier-{number}"
        if resume_from:
            assert list_checkpoints(work_dir) == [kept[0]]
            assert (aside / "step_000006").resolve() == inside.resolve() / "step_000006"
        else:
            assert list_checkpoints(work_dir) == [] and len(list_checkpoints(aside)) == 2
            assert (aside / "checkpoints").resolve() == inside.resolve()
        assert (inside / "step_000006").is_dir() and checkpoints.is_symlink() == (what != "mount")
        workdir.open_work_dir(run_in(work_dir), TrainingState(step=3), resume_from)  # nothing to set aside
        shutil.rmtree(kept[0], ignore_errors=True)
    assert not (work_dir / "earlier-3").exists()


def test_a_description_alone_is_no_earlier_run(tmp_path):
    for _ in range(2):
        workdir.open_work_dir(run_in(tmp_path), TrainingState(), None)
    assert not (tmp_path / "earlier-1").exists()


def test_what_no_run_could_go_on_from_is_set_aside_without_a_word_of_resuming(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    workdir.open_work_dir(run_in(tmp_path, resume="auto"), TrainingState(), None)
    assert capsys.readouterr().out == f"moved the outputs of an earlier run to {tmp_path / 'earlier-1'}\n"


def test_resume_auto_tells_that_it_starts_anew_and_of_what_was_set_aside(tmp_path, capsys):
    run = run_in(tmp_path, resume="auto")
    assert workdir.find_resume_point(run) is None
    told = f"--resume auto: {tmp_path / 'checkpoints'} has no checkpoint, so the run starts anew"
    assert capsys.readouterr().out == f"{told}\n"
    make_checkpoint(tmp_path, 5)
    workdir.open_work_dir(run, TrainingState(), None)
    capsys.readouterr()
    assert workdir.find_resume_point(run) is None
    aside = tmp_path / "earlier-1" / "checkpoints" / "step_000005"
    assert capsys.readouterr().out == f"{told}; to go on with a run that was set aside: --resume {aside}\n"


def test_a_resumed_run_keeps_everything_in_place(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    assert workdir.find_resume_point(run_in(tmp_path, resume="auto")) == folder
    state = TrainingState(step=5, best_score=0.5, best_checkpoint="step_000005")
    assert workdir.open_work_dir(run_in(tmp_path, resume="auto"), state, folder) == folder
    assert state == TrainingState(step=5, best_score=0.5, best_checkpoint="step_000005")
    assert folder.is_dir() and not (tmp_path / "earlier-1").exists()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(tmp_path, capsys):
    whole, damaged = (make_checkpoint(tmp_path, step) for step in (5, 10))
    (damaged / "manifest.json").unlink()
    (tmp_path / "checkpoints" / ".step_000015.tmp").mkdir()
    assert workdir.find_resume_point(run_in(tmp_path, resume="auto")) == whole
    out = capsys.readouterr().out
    assert out.count("warning: --resume auto passes over") == 1 and "step_000010 is not a ds_seg checkpoint" in out
    workdir.open_work_dir(run_in(tmp_path, resume="auto"), TrainingState(step=5), whole)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_000005"]
    assert (tmp_path / "earlier-1" / "step_000010").is_dir()


def test_only_checkpoints_after_the_resume_point_are_set_aside(tmp_path):
    folders = [make_checkpoint(tmp_path, step, keep=3) for step in (5, 10, 15)]
    workdir.open_work_dir(run_in(tmp_path), TrainingState(step=10), folders[1])
    assert [folder.is_dir() for folder in folders] == [True, True, False]
    assert (tmp_path / "earlier-1" / "step_000015").is_dir()


@pytest.mark.parametrize("place", ["../other", "earlier-1", "checkpoints/linked"])
def test_a_run_that_goes_on_from_elsewhere_is_not_mixed_with_what_lies_in_its_work_dir(tmp_path, place):
    mine = tmp_path / "mine"
    make_checkpoint(mine, 5)
    for name in ("metrics.jsonl", "wandb_run_id", "config.py"):
        (mine / name).write_text("of another run")
    elsewhere = make_checkpoint(tmp_path / "other" if "linked" in place else mine / place, 10)
    if "linked" in place:
        (mine / place).symlink_to(elsewhere)
    run = run_in(mine, resume="linked" if "linked" in place else str(elsewhere))
    resume_from = workdir.find_resume_point(run)
    assert resume_from.samefile(elsewhere) and len(list_checkpoints(mine)) == 1  # a start may still fail
    state = TrainingState(
        step=10, scheduled_steps=10, best_score=0.7, best_metric="mIoU", best_checkpoint="step_000005"
    )
    assert workdir.open_work_dir(run, state, resume_from) is None
    assert state == TrainingState(step=10, scheduled_steps=10)
    assert list_checkpoints(mine) == [] and elsewhere.is_dir()
    aside = mine / ("earlier-2" if place == "earlier-1" else "earlier-1")
    assert (aside / "checkpoints" / "step_000005").is_dir()
    assert all(
        (aside / name).read_text() == "of another run" for name in ("metrics.jsonl", "wandb_run_id", "config.py")
    )
    assert not (mine / "metrics.jsonl").exists() and not (mine / "wandb_run_id").exists()


def test_a_best_checkpoint_that_was_removed_since_is_forgotten(tmp_path):
    folder = make_checkpoint(tmp_path, 10)
    state = TrainingState(step=10, best_score=0.7, best_metric="mIoU", best_checkpoint="step_000005")
    assert workdir.open_work_dir(run_in(tmp_path), state, folder) == folder
    assert state == TrainingState(step=10)


def test_a_work_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Work dir .*file.run can't be written: .*Choose another --work-dir"):
        workdir.open_work_dir(run_in(tmp_path / "file" / "run"), TrainingState(), None)
    with pytest.raises(UserError, match=r"--work-dir: .*file is a file, but must be a folder\. Choose another"):
        workdir.find_resume_point(run_in(tmp_path / "file" / "run"))


def test_a_work_dir_that_torch_could_not_load_from_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not UTF-8, and torch could not load a checkpoint from there"):
        workdir.find_resume_point(run_in(tmp_path / os.fsdecode(b"\xe9")))
