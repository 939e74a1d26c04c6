"""What a resumed run is told of a config that has changed."""

import math

import pytest
from mmcv import Config

from ds_seg.checkpoint import TrainingState
from ds_seg.checkpoint.config_record import CONFIG_FILE, describe_changes, digest_config, format_config, record_config
from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config, read_config_file
from ds_seg.workdir import find_resume_point, open_work_dir
from saved import make_checkpoint


def run_in(folder, config="demo", *, resume=None, **changes):
    return build_run_config(RunOptions(config, work_dir=str(folder), resume=resume, cfg_options=changes), 2)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in a work dir that the demo's run has described."""
    run = run_in(tmp_path)
    open_work_dir(run, TrainingState(), None)
    return make_checkpoint(tmp_path, 5, config_digest=digest_config(run.mmseg))


def test_the_same_config_is_nothing_to_talk_of(saved, tmp_path):
    assert describe_changes(saved, run_in(tmp_path)) is None


@pytest.mark.parametrize("name", ["demo", "internvit6b_224_full_upernet_ade20k", "camvid_dinov2s_full"])
def test_a_config_written_to_a_work_dir_is_the_one_that_was_read(tmp_path, monkeypatch, name):
    for variable in ("ADE20K_ROOT", "CAMVID_ROOT"):
        monkeypatch.setenv(variable, str(tmp_path))
    run = run_in(tmp_path, name, load_from=None)
    open_work_dir(run, TrainingState(), None)
    assert digest_config(read_config_file(tmp_path / CONFIG_FILE, {})) == digest_config(run.mmseg)


def test_odd_values_are_read_back_as_they_were(tmp_path):
    odd = {
        "key": [
            'it\'s "here" \\not\nthere',
            {"class": 1, "a.b": 2, 3: {}},
            (),
            (1,),
            [{}],
            None,
            -1e-6,
            math.pi,
            "x" * 300,
        ]
    }
    (tmp_path / CONFIG_FILE).write_text(format_config(odd))
    assert Config.fromfile(tmp_path / CONFIG_FILE)._cfg_dict.to_dict() == odd


def test_changes_are_named_with_both_values(saved, tmp_path):
    changes = {"runner.max_iters": 7, "data.train.pipeline.0.color_type": "gray", "evaluation.window_batch": 3}
    assert describe_changes(saved, run_in(tmp_path, **changes)) == (
        "the config is not the one that step_000005 was saved with: runner.max_iters 300 -> 7, "
        'data.train.pipeline[0].color_type (none) -> "gray", evaluation.window_batch (none) -> 3. '
        "The run uses the new values"
    )


def test_the_config_in_a_work_dir_holds_what_options_said(tmp_path):
    options = {"seed": 7, "load_from": "some.pth", "on_divergence": "rollback", "compile": True}
    open_work_dir(build_run_config(RunOptions("demo", work_dir=str(tmp_path), **options), 2), TrainingState(), None)
    again = build_run_config(RunOptions(str(tmp_path / CONFIG_FILE)), 2)
    assert (again.seed, again.load_from, again.max_rollbacks, again.compile) == (7, "some.pth", 3, True)


def test_weights_to_start_from_are_nothing_to_talk_of(saved, tmp_path):
    assert describe_changes(saved, run_in(tmp_path, load_from="some.pth")) is None


def test_a_long_list_is_cut(saved, tmp_path):
    changes = {f"model.backbone.{key}": "x" * 99 for key in "abcdefghijkl"}
    text = describe_changes(saved, run_in(tmp_path, **changes))
    assert text.count("->") == 8 and ", and 4 more. The run uses the new values" in text
    assert f'model.backbone.a (none) -> "{"x" * 36}...' in text


def test_a_config_that_is_gone_or_of_another_run_is_not_compared(saved, tmp_path, capsys):
    run = run_in(tmp_path, resume="auto", **{"runner.max_iters": 7})
    assert find_resume_point(run) == saved
    open_work_dir(run, TrainingState(step=5), saved)
    assert "saved with: runner.max_iters 300 -> 7. The run uses the new values\n" in capsys.readouterr().out
    text = describe_changes(saved, run_in(tmp_path, **{"runner.max_iters": 8}))
    assert text.endswith(f"{tmp_path / CONFIG_FILE} is of another run, so what has changed is not known")
    (tmp_path / CONFIG_FILE).write_text("model = dict(")
    assert describe_changes(saved, run).endswith("can't be read, so what has changed is not known")


def test_variables_of_a_config_file_are_not_recorded():
    path = CONFIGS_ROOT / "runs" / "demo.py"
    config = read_config_file(path, {})
    assert set(record_config({**config, "crop_size": 7})) == set(record_config(config))
