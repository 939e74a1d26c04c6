"""What a checkpoint decides of a run: the size of a step, and what its backbone computes in."""

import json
from pathlib import Path

import pytest
import torch

from ds_seg import distributed
from ds_seg.checkpoint.store import HEADS_FILE
from ds_seg.config import CONFIGS_ROOT, RunOptions
from ds_seg.errors import CheckpointError, ConfigError
from ds_seg.resumption import resolve_run, resolve_trained
from saved import STATE, make_checkpoint
from tiny_export import describe, export

FP32, BF16 = (str(CONFIGS_ROOT / "deepspeed" / f"zero3_{name}.json") for name in ("fp32", "bf16"))


def save(work_dir, step, **changes):
    """A checkpoint whose state file says what a resume wants to know."""
    state = {"global_batch": 16, "world_size": 1, "micro_batch": 8, "bf16": False, **changes}
    return make_checkpoint(work_dir, step, json.dumps(state))


def test_a_state_file_that_was_emptied_is_passed_over(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 10, global_batch=99) / STATE).write_text("{}")
    run = resolve_run(RunOptions("demo", work_dir=str(tmp_path), resume="auto"))
    assert "the checkpoint's was 16 = 8 crops" in " ".join(run.notes)
    assert "noise do not depend on that, but for dropout in heads" in " ".join(run.notes)


@pytest.mark.parametrize("trained_in_bf16", [True, False])
@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "pth"])
def test_a_trained_model_computes_in_what_it_was_trained_in(tmp_path, capsys, kind, trained_in_bf16):
    if kind == "checkpoint":
        source = save(tmp_path, 5, bf16=trained_in_bf16)
    else:
        source = tmp_path / f"model.{kind}"
        export(source, describe(dtype=torch.bfloat16 if trained_in_bf16 else torch.float32))
    run, weights = resolve_trained(RunOptions("demo"), str(source))
    assert weights == source and run.bf16 == trained_in_bf16
    said = "" if trained_in_bf16 else f"the backbone computes in float32, what {source} was trained in\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("given", [FP32, BF16])
def test_a_deepspeed_json_on_the_command_line_decides(tmp_path, given):
    source = save(tmp_path, 5)
    run, _ = resolve_trained(RunOptions("demo", deepspeed_config=given), str(source))
    assert run.bf16 == (given == BF16)


def test_any_number_of_processes_uses_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**json.loads(Path(BF16).read_text()), "train_batch_size": 8}))
    options = RunOptions("demo", deepspeed_config=str(path), cfg_options={"optimizer_config.cumulative_iters": 2})
    with pytest.raises(ConfigError, match=r"(?s)global_batch: got 8, which 3 processes .*train_batch_size: got 8"):
        resolve_run(options)
    run, _ = resolve_trained(options, str(save(tmp_path, 5)))
    assert run.world_size == 3


def test_a_file_that_does_not_tell_leaves_it_to_the_config(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / HEADS_FILE)
    assert resolve_trained(RunOptions("demo"), str(tmp_path / HEADS_FILE))[0].bf16


def test_a_damaged_state_file_is_told(tmp_path):
    folder = save(tmp_path, 5)
    (folder / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_000005 is damaged: state\.json has 2 bytes"):
        resolve_trained(RunOptions("demo"), str(folder))
