"""Configs written as InternVL's segmentation folder and InternVL-MMDetSeg write them, read as they are."""

import json
from pathlib import Path

import pytest

from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config
from ds_seg.errors import ConfigError

DIALECT = Path(__file__).parents[2] / "configs_dialect"
FILES = sorted(path for path in DIALECT.glob("*/*.py") if path.parent.name != "_base_")


def build(path, **options):
    return build_run_config(RunOptions(str(path), **options), 2)


def write(folder, text, base="demo"):
    path = folder / "mine.py"
    path.write_text(f"_base_ = {str(CONFIGS_ROOT / 'runs' / f'{base}.py')!r}\n{text}\n")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_config_of_each_folder_is_read_as_it_is(path, monkeypatch):
    monkeypatch.chdir(DIALECT)
    run = build(path)
    assert run.deepspeed["zero_optimization"]["stage"] == 3 and run.bf16
    assert (run.micro_batch, run.global_batch, run.schedule.max_steps) == (2, 4, 2)
    assert run.load_from == "./pretrained/tiny.pth" and run.evaluation.save_best == "mIoU" and run.resume is None
    assert run.optimizer.layer_decay_rate == (1.0 if "frozen" in path.stem else 0.95)
    assert run.optimizer.weight_decay == (0.0 if "linear_probing" in str(path) else 0.05)


def test_what_means_nothing_is_named_once_with_its_reason(monkeypatch):
    monkeypatch.chdir(DIALECT)
    notes = build(DIALECT / "full_tuning/upernet_tiny.py").notes
    named = [note.split("'")[1] for note in notes]
    assert sorted(named) == sorted(
        "workflow dist_params log_level cudnn_benchmark deepspeed deepspeed_config model.backbone.use_flash_attn "
        "checkpoint_config.deepspeed evaluation.pre_eval log_config.hooks[1] custom_hooks[0]".split()
    )
    assert all(": " in note for note in notes)
    assert "zero_configs/adam_zero1_bf16.json is for ZeRO stage 1; zero3_bf16.json is used" in "\n".join(notes)


def test_other_keys_without_meaning(tmp_path):
    text = """
fp16 = dict(loss_scale=512.)
data = dict(persistent_workers=True, prefetch_factor=2, pin_memory=True)
evaluation = dict(gpu_collect=True, rule="greater", metric=["mIoU", "mDice"])
checkpoint_config = dict(create_symlink=False)
custom_hooks = [dict(type="ToFloat16Hook")]
"""
    named = {note.split("'")[1] for note in build(write(tmp_path, text)).notes}
    assert named == {
        *("fp16", "data.persistent_workers", "data.prefetch_factor", "data.pin_memory", "evaluation.gpu_collect"),
        *("evaluation.rule", "checkpoint_config.create_symlink", "custom_hooks[0]"),
    }


def test_what_mmsegmentations_own_configs_write_about_half_precision(tmp_path):
    text = "optimizer_config = dict(type='{}Fp16OptimizerHook', loss_scale='dynamic', grad_clip=dict(max_norm=3))"
    run = build(write(tmp_path, text.format("")))
    assert run.clip_norm == 3 and run.notes == (
        "config key 'optimizer_config.loss_scale' has no effect: bf16 has the range of FP32",
    )
    assert build(write(tmp_path, text.format("GradientCumulative"))).clip_norm == 3


def test_a_neck_that_is_none(tmp_path):
    assert not build(write(tmp_path, "model = dict(neck=None)")).notes


@pytest.mark.parametrize("constructor", ["LearningRateDecay", "LayerDecay"])
def test_mmsegmentations_own_layer_decay_is_internvls(constructor, tmp_path):
    rate = {"LearningRateDecay": "decay_rate", "LayerDecay": "layer_decay_rate"}[constructor]
    text = "optimizer = dict(constructor='{}OptimizerConstructor', paramwise_cfg=dict(_delete_=True, {}=0.7, {}))"
    text = text.format(constructor, rate, "num_layers=6, decay_type='{}'")
    (tmp_path / "theirs").mkdir()
    internvls = "optimizer = dict(paramwise_cfg=dict(_delete_=True, num_layers=6, layer_decay_rate=0.7))"
    wanted = build(write(tmp_path / "theirs", internvls)).optimizer
    assert build(write(tmp_path, text.format("layer_wise"))).optimizer == wanted and wanted.layer_decay_rate == 0.7
    with pytest.raises(ConfigError, match=r"paramwise_cfg\.decay_type: got 'stage_wise', want 'layer_wise'"):
        build(write(tmp_path, text.format("stage_wise")))


def test_mmsegmentations_own_wandb_logger(tmp_path):
    hook = "dict(type='MMSegWandbHook', init_kwargs=dict(project='a'), log_checkpoint=True, num_eval_images=9)"
    run = build(write(tmp_path, f"log_config = dict(hooks=[{hook}])"))
    assert run.wandb.enabled and run.wandb.init_kwargs == {"project": "a"}
    idle = [note.split("'")[1] for note in run.notes]
    assert idle == ["log_config.hooks[0].log_checkpoint", "log_config.hooks[0].num_eval_images"]


def test_a_logger_has_no_interval_of_its_own(tmp_path):
    text = "log_config = dict(interval=20, hooks=[dict(type='TextLoggerHook', interval={})])"
    (note,) = build(write(tmp_path, text.format(5))).notes
    assert "'log_config.hooks[0].interval' has no effect: everything is logged every 20 steps" in note
    assert not build(write(tmp_path, text.format(20))).notes


def test_deepspeed_false_uses_zero3_all_the_same(tmp_path):
    run = build(write(tmp_path, "deepspeed = False\ndeepspeed_config = 'zero_configs/absent.json'"))
    assert run.deepspeed["zero_optimization"]["stage"] == 3
    assert any("'deepspeed_config' has no effect: deepspeed is False; zero3_bf16.json is used" in n for n in run.notes)


def test_a_deepspeed_config_that_is_not_there(tmp_path):
    run = build(write(tmp_path, "deepspeed = True\ndeepspeed_config = 'zero_configs/absent.json'"))
    assert any("there is no file zero_configs/absent.json" in note for note in run.notes)
    with pytest.raises(ConfigError, match=r"DeepSpeed config 'zero_configs/absent\.json' does not exist"):
        build(write(tmp_path, "deepspeed_config = 'zero_configs/absent.json'"))


def test_a_deepspeed_config_that_fits_is_used_and_the_command_line_comes_first(tmp_path):
    content = json.loads((CONFIGS_ROOT / "deepspeed/zero3_bf16.json").read_text())
    for name, value in (("file", 1e8), ("command_line", 2e8)):
        content["zero_optimization"]["reduce_bucket_size"] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path = write(tmp_path, f"deepspeed = True\ndeepspeed_config = {str(tmp_path / 'file.json')!r}")
    assert build(path).deepspeed["zero_optimization"]["reduce_bucket_size"] == 1e8
    given = str(tmp_path / "command_line.json")
    assert build(path, deepspeed_config=given).deepspeed["zero_optimization"]["reduce_bucket_size"] == 2e8


def test_where_the_weights_to_start_from_are_named(tmp_path):
    assert build(write(tmp_path, "pretrained = 'a.pth'")).load_from == "a.pth"
    assert build(write(tmp_path, "pretrained = 'a.pth'\nmodel = dict(pretrained='b.pth')")).load_from == "b.pth"
    assert build(write(tmp_path, "pretrained = 'a.pth'\nload_from = 'c.pth'")).load_from == "c.pth"
    assert build(write(tmp_path, "pretrained = 'a.pth'"), load_from="d.pth").load_from == "d.pth"


def test_resume_from():
    folder = "work_dirs/run/checkpoints/step_000002"
    assert build("demo", cfg_options={"resume_from": folder}).resume == folder
    assert build("demo", cfg_options={"auto_resume": True}).resume == "auto"
    with pytest.raises(ConfigError, match=r"resume_from: got 'iter_2\.pth', but a \.pth file holds no ZeRO-3"):
        build("demo", cfg_options={"resume_from": "iter_2.pth"})


def test_an_unknown_key_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"1 fault in .*mine\.py:\n  - gpu_multithreading: unknown key"):
        build(write(tmp_path, "gpu_multithreading = False"))
    with pytest.raises(ConfigError, match=r"mine\.py:\n  - checkpoint_config\.deepsped: unknown key"):
        build(write(tmp_path, "checkpoint_config = dict(deepsped=True)"))


@pytest.mark.parametrize(("part", "steps", "images"), [(16, 5000, 1263), (8, 10000, 2526), (4, 20000, 5052)])
def test_few_shot_recipes_are_the_full_one_on_fewer_images(part, steps, images):
    run, full = (build(f"internvit6b_224_full_linear_ade20k{suffix}") for suffix in (f"_1of{part}", ""))
    assert run.data.train.max_image_num == images and run.schedule.max_steps == steps
    assert run.model == full.model and run.optimizer == full.optimizer and run.optimizer.decay_embeddings
    assert run.data.val == full.data.val and "max_image_num" not in full.data.train
