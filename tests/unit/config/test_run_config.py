import json

import pytest
from deepspeed.utils.config import get_timers_config

from ds_seg.config import CONFIGS_ROOT, CheckpointSettings, RunOptions, build_run_config
from ds_seg.config.deepspeed_json import suit_device
from ds_seg.config.head_fields import predicting_head
from ds_seg.config.overrides import parse_overrides
from ds_seg.errors import ConfigError, count

RUNS = sorted(path.stem for path in (CONFIGS_ROOT / "runs").glob("*.py"))


def build(config="demo", world_size=2, **options):
    return build_run_config(RunOptions(str(config), **options), world_size)


def build_with(*pairs, config="demo", world_size=2):
    return build(config, world_size, cfg_options=parse_overrides(pairs))


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_run_resolves(name):
    run = build(name, 2)
    assert run.deepspeed["zero_optimization"]["stage"] == 3 and run.bf16
    assert run.deepspeed["train_batch_size"] == run.global_batch == run.mmseg.global_batch
    assert not run.notes
    assert run.optimizer.layer_decay_rate is not None  # which exempts biases and norms from weight decay


def test_a_path_and_a_bare_name_are_the_same_run():
    by_name, by_path = build("demo"), build(CONFIGS_ROOT / "runs" / "demo.py")
    assert by_name.mmseg.to_dict() == by_path.mmseg.to_dict() and by_name.name == by_path.name == "demo"


def test_the_published_recipe():
    run = build("internvit6b_224_full_linear_ade20k", 8)
    assert (run.micro_batch, run.accumulation_steps, run.global_batch) == (2, 1, 16)
    assert run.optimizer.lr == 4e-5 and run.optimizer.layer_decay_rate == 0.95 and run.optimizer.weight_decay == 0.05
    assert (
        run.schedule.warmup_steps == 1500
        and run.schedule.lr_hook["warmup_ratio"] == 1e-6
        and run.schedule.max_steps == 80000
    )
    assert run.clip_norm is None and run.model.backbone.drop_path_rate == 0.4


def test_global_batch_stays_while_processes_and_micro_batch_change():
    runs = [build_with(f"data.samples_per_gpu={micro}", world_size=world) for world, micro in [(1, 4), (2, 2), (4, 2)]]
    assert {run.global_batch for run in runs} == {8}
    assert [run.accumulation_steps for run in runs] == [2, 2, 1]
    assert not any(run.notes for run in runs)


def test_samples_per_gpu_is_the_most_a_process_takes_at_once():
    for most, world_size, wanted in ((3, 1, (2, 4)), (3, 2, (2, 2)), (8, 4, (2, 1)), (5, 8, (1, 1))):
        run = build_with(f"data.samples_per_gpu={most}", world_size=world_size)
        assert (run.micro_batch, run.accumulation_steps) == wanted and run.global_batch == 8
        assert run.deepspeed["train_micro_batch_size_per_gpu"] == run.micro_batch
        share = f"not data.samples_per_gpu={most}: a process has {8 // world_size} of the 8"
        assert run.notes == (f"{count(wanted[0], 'crop')} at once, {share}",)


def test_deepspeed_does_not_wait_for_the_gpu_to_take_times_unless_it_is_asked(tmp_path):
    assert not get_timers_config(build("demo").deepspeed).enabled
    path = tmp_path / "timed.json"
    path.write_text(json.dumps({**build("demo").deepspeed, "timers": {"throughput": {"enabled": True}}}))
    assert get_timers_config(build(deepspeed_config=str(path)).deepspeed).enabled


def test_a_warm_up_that_the_run_does_not_outlast_is_told_of():
    (note,) = build_with("lr_config.warmup_iters=100", "runner.max_iters=100").notes
    assert "lr_config.warmup_iters=100 is no less than the run's 100 steps" in note
    assert not build_with("lr_config.warmup_iters=99", "runner.max_iters=100").notes


def test_what_accumulation_makes_of_max_iters_is_told():
    pairs = ["global_batch=None", "optimizer_config.cumulative_iters=4", "runner.max_iters=1000"]
    (note,) = build_with(*pairs).notes
    assert "runner.max_iters=1000 and all intervals count optimizer steps, of 4 micro-batches" in note
    assert "makes 250 steps" in note
    assert not build_with(*pairs, "optimizer_config.cumulative_iters=1").notes


def test_the_global_batch_of_a_checkpoint_comes_before_the_configs():
    pairs = ["global_batch=None", "data.samples_per_gpu=4", "optimizer_config.cumulative_iters=2"]
    found = {}
    for world_size, kept in ((2, None), (4, 16), (1, 16), (3, 15)):
        options = RunOptions("demo", cfg_options=parse_overrides(pairs), global_batch=kept)
        run = build_run_config(options, world_size)
        found[world_size] = run.global_batch, run.micro_batch, run.accumulation_steps
    assert found == {2: (16, 4, 2), 4: (16, 4, 1), 1: (16, 4, 4), 3: (15, 1, 5)}
    with pytest.raises(ConfigError, match=r"got 16, that of the checkpoint to resume from, which 3 processes can't .*"):
        build_run_config(RunOptions("demo", cfg_options=parse_overrides(pairs), global_batch=16), 3)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["optimizer.lerning_rate=1"], r"optimizer\.lerning_rate: unknown key"),
        (["optimizr.lr=1"], r"no config key is called 'optimizr'\. Did you mean 'optimizer'"),
        (["optimizer.lr=fast"], r"optimizer\.lr: got 'fast', want a number"),
        (["optimizer.lr=-1"], r"optimizer\.lr: got -1, want at least 0"),
        (["optimizer.lr=inf"], r"optimizer\.lr: got inf, want at least 0, and finite"),
        (
            ["optimizer.type=SGD", "optimizer.momentum=0.9", "optimizer.nesterov=True"],
            r"1 fault .*\n.*optimizer\.type: got 'SGD'; both engines run 'AdamW', .* optimizer=dict\(_delete_=True, ",
        ),
        (["optimizer.momentum=0.9"], r"optimizer\.momentum: unknown key.* comes from _base_ goes with _delete_=True"),
        (["lr_config.policy=fixed"], r"lr_config\.power: unknown key.* comes from _base_ goes with _delete_=True"),
        (["optimizer.betas=[0.9]"], r"optimizer\.betas: got"),
        (
            ["optimizer.betas=[0.9,1.5]"],
            r"optimizer\.betas: got \(?\[?0\.9, 1\.5.*want two numbers from 0 up to below 1",
        ),
        (["optimizer.constructor=Mine"], r"optimizer\.constructor: got 'Mine'"),
        (["optimizer.paramwise_cfg.num_layers=12"], r"num_layers: got 12, but model\.backbone has 6 blocks"),
        (["optimizer.paramwise_cfg.layer_decay_rate=1.5"], r"layer_decay_rate: got 1\.5, want between 0 and 1"),
        (["optimizer_config.grad_clip.norm_type=1"], r"norm_type: got 1; the joint norm is the 2-norm"),
        (["optimizer_config.type=DistOptimizerHook"], r"optimizer_config\.type: got 'DistOptimizerHook'"),
        (["optimizer_config.cumulative_iters=3"], r"cumulative_iters: got 3, but global_batch makes it"),
        (["lr_config.policy=stairs"], r"lr_config\.policy: got 'stairs', want one of poly, "),
        (["lr_config.policy=cosine"], r"lr_config\.policy: got 'cosine', .* Did you mean 'CosineAnnealing'\?"),
        (["lr_config.by_epoch=True"], r"lr_config\.by_epoch: got True"),
        (["lr_config.warmup=slow"], r"lr_config\.warmup: got 'slow'"),
        (
            ["runner.type=EpochBasedRunner", "runner.max_epochs=20"],
            r"1 fault .*\n.*runner: got .*'max_epochs': 20.*, want dict\(type='IterBasedRunner', max_iters=",
        ),
        (["runner.max_epochs=20"], r"runner: got .*'max_epochs': 20.*, want dict\(type='IterBasedRunner', max_iters="),
        (["runner.max_iters=0"], r"runner\.max_iters: got 0, want a whole number of at least 1"),
        (["log_config.hooks.1.type=PaviLoggerHook"], r"log_config\.hooks\[1\]: got type 'PaviLoggerHook'"),
        (
            ["evaluation.metric=[mIoU,mFscore]"],
            r"evaluation\.metric: got \['mIoU', 'mFscore'\], want 'mIoU' or 'mDice' .*; mDice is the F-score of beta 1",
        ),
        (["evaluation.save_best=loss"], r"evaluation\.save_best: got 'loss', want one of mIoU, mAcc, mDice, aAcc, or"),
        (["evaluation.by_epoch=True"], r"evaluation\.by_epoch: got True"),
        (
            ["global_batch=15"],
            r"global_batch: got 15, which 2 processes can't share evenly\. Start a number .* it: 1, 3, 5, 15\.",
        ),
        (["model.type=Segmentor"], r"model\.type: got 'Segmentor', want 'EncoderDecoder' or 'Cascade"),
        (["global_batch=0"], r"global_batch: got 0, want a whole number of at least 1"),
        (["model.backbone=None"], r"model\.backbone: missing"),
        (["model.backbone.out_indices=3"], r"model\.backbone\.out_indices: got 3, want a list of block numbers"),
        (["model.backbone.init_values=small"], r"model\.backbone\.init_values: got 'small', want a number"),
        (["model.backbone.drop_path_rate=-1"], r"model\.backbone\.drop_path_rate: got -1, want at least 0"),
        (
            ["model.decode_head.num_classes=0"],
            r"model\.decode_head\.num_classes: got 0, want a whole number of at least 1",
        ),
        (["model.type=CascadeEncoderDecoder"], r"model\.decode_head: .*needs a list of at least two heads"),
        (["model.num_stages=2"], r"model\.num_stages: unknown key"),
        (["model.decode_head.num_classes=0"], r"model\.decode_head\.num_classes: got 0, want a whole number"),
        (["model.auxiliary_head=FCNHead"], r"model\.auxiliary_head: got 'FCNHead', want a dict with a type"),
        (["model.test_cfg.subdivision_steps=2"], r"model\.test_cfg\.subdivision_steps: unknown key"),
        (
            ["model.backbone.type=BEiT", "model.backbone.depth=x"],
            r"1 fault .*\n.*model\.backbone\.type: got 'BEiT', want .* backbone=dict\(_delete_=True, type='InternViT',",
        ),
        (["model.neck.type=FPN"], r"1 fault .*\n.*model\.neck: .* Write neck=None, and model\.backbone\.with_fpn=True"),
        (
            ["data_root=elsewhere"],
            r"--cfg-options data_root: 'data_root' is a variable, .* such as data\.train\.data_root",
        ),
        (["model.test_cfg.mode=tile"], r"model\.test_cfg\.mode: got 'tile'"),
        (["model.test_cfg.strid=[4,4]"], r"model\.test_cfg\.strid: unknown key\. Did you mean 'stride'"),
        (["model.test_cfg.mode=slide"], r"model\.test_cfg: mode='slide' needs crop_size"),
        (["log_config.hooks.1=text"], r"--cfg-options log_config\.hooks\.1 don't fit"),
        (["lr_config=3"], r"lr_config: got 3, want a dict"),
        (["data.workers_per_gpu=-1"], r"data\.workers_per_gpu: got -1"),
        (["model.backbone.num_heads=0"], r"model\.backbone\.num_heads: got 0, want a whole number of at least 1"),
        (["model.backbone.patch_size=0"], r"model\.backbone\.patch_size: got 0, want a whole number"),
        (["model.backbone.mlp_ratio=0"], r"model\.backbone\.mlp_ratio: got 0, want at least 0\.005"),
        (["model.backbone.depth=x"], r"model\.backbone\.depth: got 'x', want a whole number"),
        (["model.backbone.embed_dim=None"], r"model\.backbone\.embed_dim: got None, want a whole number"),
        (["model.backbone.freeze_vit=no"], r"model\.backbone\.freeze_vit: got 'no', want True or False"),
        (["model.train_cfg=3"], r"model\.train_cfg: got 3, want a dict"),
        (["model.decode_head.loss_decode=3"], r"model\.decode_head\.loss_decode: got 3, want a dict"),
        (["model.decode_head.loss_decode.loss_weight=-1"], r"loss_decode\.loss_weight: got -1, want at least 0"),
        (
            ["model.decode_head.loss_decode.class_weight=[-1,1]"],
            r"class_weight: got \[-1, 1\], want a finite number of",
        ),
        (["model.decode_head.loss_decode.class_weight=[1,2]"], r"class_weight: has 2 numbers, .* scores 6 classes"),
        (["model.decode_head.norm_cfg.type=SycnBN"], r"head\.norm_cfg\.type: got 'SycnBN'\. Did you mean 'SyncBN'\?"),
        (["model.decode_head.norm_cfg=3"], r"head\.norm_cfg: got 3, want a dict"),
        (["model.decode_head.loss_decode.class_weight=[0,0]"], r"class_weight: got \[0, 0\].*one of them above 0"),
        (["model.decode_head.loss_decode.class_weight=[1,1e999]"], r"class_weight: got \[1, inf\], want a finite"),
        (["optimizer.paramwise_cfg.custom_keys=3"], r"optimizer\.paramwise_cfg\.custom_keys: got 3, want a dict"),
        (["optimizer_config=3"], r"optimizer_config: got 3, want a dict"),
        (["lr_config.min_lr=1"], r"lr_config\.min_lr: got 1, above optimizer\.lr=0\.\d+: the rate would rise"),
        (["seed=99999999999999999999"], r"seed: got 99999999999999999999, want a whole number of at most 9223372036"),
        (["load_from=5"], r"load_from: got 5, want a string"),
        (["model.pretrained=5"], r"model\.pretrained: got 5, want a string"),
        (["resume_from=5"], r"resume_from: got 5, want a string"),
        (["work_dir=5"], r"work_dir: got 5, want a string"),
        (["deepspeed_config=5"], r"deepspeed_config: got 5, want a string"),
        (
            ["model.init_cfg.type=Pretrained", "model.init_cfg.checkpoint=a.pth"],
            r"model\.init_cfg: got .*'a\.pth'.*, which is not read\. Remove it, and name the weights .* in load_from",
        ),
        (["model.backbone.init_cfg.checkpoint=a.pth"], r"model\.backbone\.init_cfg: got .* is not read.*load_from"),
        (["compile=no"], r"compile: got 'no', want True or False"),
        (["log_config.hooks=Text"], r"log_config\.hooks: got 'Text', want a list of dicts"),
        (["log_config.hooks.1.init_kwargs=5"], r"log_config\.hooks\[1\]\.init_kwargs: got 5, want a dict"),
        (["data.trian.img_dir=x"], r"data\.trian: unknown key\. Did you mean 'train'"),
    ],
)
def test_each_mistake_is_named_with_its_field(pairs, message):
    with pytest.raises(ConfigError, match=message):
        build_with(*pairs)


def test_a_crop_that_is_no_multiple_of_the_patch_names_the_nearest():
    with pytest.raises(ConfigError, match=r"RandomCrop|crop_size: got \(100, 112\).*14 px patch.*\(98, 112\)"):
        build_with("data.train.pipeline.3.crop_size=[100,112]")
    with pytest.raises(ConfigError, match=r"model\.test_cfg\.crop_size: got \(500, 504\)"):
        build_with("model.test_cfg.crop_size=[500,504]", config="internvit6b_224_linear_ade20k")


CASCADE = """
head = dict(in_channels=192, channels=8)
model = dict(
    type="CascadeEncoderDecoder",
    num_stages=2,
    decode_head=[dict(head, type="FCNHead", num_classes=9), dict(head, type="OCRHead", num_classes=6)],
    test_cfg=dict(mode="whole", subdivision_steps=2, subdivision_num_points=64, scale_factor=2),
)
"""


def test_a_head_may_have_one_class():
    assert predicting_head(build_with("model.decode_head.num_classes=1").model)[1].num_classes == 1


def test_a_cascade_is_a_list_of_num_stages_heads(tmp_path):
    path = write_config(tmp_path, CASCADE)
    run = build(path)
    assert predicting_head(run.model)[1].num_classes == 6 and run.model.test_cfg.subdivision_steps == 2
    with pytest.raises(ConfigError, match=r"model\.num_stages: got 3, but decode_head lists 2"):
        build_with("model.num_stages=3", config=path)
    with pytest.raises(ConfigError, match=r"model\.decode_head: several heads in a row need model\.type='Cascade"):
        build_with("model.type=EncoderDecoder", config=path)


def test_the_training_crop_is_the_pipelines_else_the_windows_else_the_backbones():
    crop = "data.train.pipeline.3"
    assert build_with(f"{crop}.crop_size=[56,112]", "data.train.pipeline.6.size=[56,112]").train_crop_px == (56, 112)
    assert build_with(f"{crop}.type=RandomRotate").train_crop_px == (112, 112)
    window = ["model.test_cfg.mode=slide", "model.test_cfg.crop_size=[70,84]", "model.test_cfg.stride=[70,84]"]
    assert build_with(f"{crop}.type=RandomRotate", *window).train_crop_px == (70, 84)


def test_without_lr_config_the_rate_is_constant():
    schedule = build_with("lr_config=None").schedule
    assert schedule.lr_hook["type"].__name__ == "FixedLrUpdaterHook" and schedule.warmup_steps == 0


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"--seed: got -1, want a whole number of at least 0"):
        build(seed=-1)


def test_all_faults_come_in_one_message():
    with pytest.raises(ConfigError, match=r"2 faults in .*demo\.py") as caught:
        build_with("optimizer.lr=-1", "runner.max_iters=0")
    assert "optimizer.lr" in str(caught.value) and "runner.max_iters" in str(caught.value)


def test_a_missing_config_lists_the_runs():
    with pytest.raises(ConfigError, match=r"CONFIG 'dmeo' is neither a file.*Did you mean 'demo'") as caught:
        build("dmeo")
    assert all(name in str(caught.value) for name in RUNS)


def write_config(folder, text):
    path = folder / "mine.py"
    path.write_text(f"_base_ = {str(CONFIGS_ROOT / 'runs' / 'demo.py')!r}\n{text}\n")
    return path


def test_a_misspelt_key_in_a_file_is_an_error_and_a_variable_is_not(tmp_path):
    assert build(write_config(tmp_path, "my_lr = 3e-4\noptimizer = dict(lr=my_lr)")).optimizer.lr == 3e-4
    with pytest.raises(ConfigError, match=r"evalution: unknown key.*Did you mean 'evaluation'"):
        build(write_config(tmp_path, "evalution = dict(interval=5)"))


def test_a_config_with_a_syntax_error_or_missing_base_says_so(tmp_path):
    with pytest.raises(
        ConfigError, match=r"mine\.py line 2 is not valid Python: '\(' was never closed \(model = dict\("
    ):
        build(write_config(tmp_path, "model = dict("))
    with pytest.raises(ConfigError, match=r"mine\.py line 3 can't be read: NameError: name 'lr_'"):
        build(write_config(tmp_path, "\noptimizer = dict(lr=lr_)"))
    (tmp_path / "mine.py").write_text("_base_ = './absent.py'")
    with pytest.raises(ConfigError, match=r"can't be read: FileNotFoundError.*absent\.py"):
        build(tmp_path / "mine.py")


def test_a_config_that_was_cut_off_anywhere_is_read_or_refused(tmp_path):
    """In a base too: no traceback, one message with the file; the line where Python knows one."""
    source = (CONFIGS_ROOT / "datasets" / "demo.py").read_text()
    (tmp_path / "mine.py").write_text("_base_ = './data.py'")
    for length in range(0, len(source), 41):
        (tmp_path / "data.py").write_text(source[:length])
        with pytest.raises(ConfigError, match=r"data\.py line \d+ |data\.py: the file is empty|missing; a run needs"):
            build(tmp_path / "mine.py")


def test_missing_sections_are_named(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("model = dict()\n")
    with pytest.raises(ConfigError, match=r"optimizer: missing"):
        build(path)


def test_keys_without_meaning_are_noted(tmp_path):
    run = build(write_config(tmp_path, "workflow = [('train', 1)]\ncudnn_benchmark = True"))
    assert len(run.notes) == 2 and "workflow" in run.notes[0]


@pytest.mark.parametrize("pair", ["optimizer.lr", "=3"])
def test_an_override_without_a_value_is_refused(pair):
    with pytest.raises(ConfigError, match="want key=value"):
        parse_overrides([pair])


@pytest.mark.parametrize("value", ["dict(type='X')", "dict(type='X', b=1)", "[dict(a=1, b=2)]", "{'b': 1, 'c': 2}"])
def test_an_override_with_a_dict_names_the_way_out(value):
    with pytest.raises(ConfigError, match=r"a value can't be a dict\. Set its keys one by one"):
        parse_overrides([f"model.decode_head.loss_decode={value}"])


@pytest.mark.parametrize("value", ["[1,2", "1,2]", "(1,2", "[(1,2]"])
def test_an_override_with_a_bracket_too_few_is_refused(value):
    with pytest.raises(ConfigError, match=r"--cfg-options a=.*: its brackets don't match"):
        parse_overrides([f"a={value}"])


def test_overrides_with_lists_and_tuples():
    parsed = parse_overrides(["a.b=[(1,2),3]", "c=1,x", "d=f(1)", "e="])
    assert parsed == {"a.b": [(1, 2), 3], "c": [1, "x"], "d": "f(1)", "e": ""}


def test_overrides_that_do_not_fit_the_file():
    with pytest.raises(ConfigError, match="don't fit"):
        build_with("data.train.pipeline.99.type=Resize")


def write_json(folder, **changes):
    content = json.loads((CONFIGS_ROOT / "deepspeed" / "zero3_bf16.json").read_text())
    content.update(changes)
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 7}, r"deepspeed\.train_batch_size: got 7, but the run makes it 8"),
        ({"gradient_accumulation_steps": 5}, r"gradient_accumulation_steps: got 5"),
        ({"train_micro_batch_size_per_gpu": 3}, r"train_micro_batch_size_per_gpu: got 3"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage: got 2, want 3"),
        ({"zero_optimization": None}, r"zero_optimization\.stage: got None, want 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0}}},
            r"offload_optimizer\.ratio: got 0, want the share .*, above 0 and at most 1",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp64"}},
            r"data_types\.grad_accum_dtype: got 'fp64', want fp32 or bf16",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            r"offload_optimizer\.super_offload: got True, which makes DeepSpeed step with another optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}},
            r"zero_optimization\.zenflow: got \{'topk_ratio': 0\.1\}, which makes DeepSpeed step with another",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device: got 'nvme', want 'cpu': what DeepSpeed swaps",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"offload_param\.device: got 'nvme', want 'cpu'",
        ),
        ({"gradient_clipping": 1.0}, r"deepspeed\.gradient_clipping: got 1\.0.*optimizer_config\.grad_clip"),
        ({"optimizer": {"type": "Adam"}}, r"deepspeed\.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler"),
        ({"fp16": {"enabled": True}}, r"deepspeed\.fp16: is enabled; the backbone trains in bf16"),
        ({"bf16": True}, r"deepspeed\.bf16: got True"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            r"bf16_master_weights_and_grads: got true, but masters stay FP32",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            r"quantized_weights: got True, which round",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, r"offload_param: got 'cpu', want a dict"),
        ({"zero_optimisation": {}}, r"zero_optimisation: unknown key\. Did you mean 'zero_optimization'"),
    ],
)
def test_each_contradiction_in_the_deepspeed_json_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(deepspeed_config=write_json(tmp_path, **changes))


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"reduce_bucket_sice": 1}, r"reduce_bucket_sice: unknown key\. Did you mean 'reduce_bucket_size'\? Correct"),
        ({"reduce_bucket_size": 0}, r"reduce_bucket_size: got 0: Input should be greater than 0\. Correct"),
        ({"reduce_bucket_size": "lots"}, r"reduce_bucket_size: got 'lots': Input should be a valid integer"),
        ({"stage3_max_live_parameters": -1}, r"stage3_max_live_parameters: got -1: Input should be greater than or eq"),
        ({"offload_param": {"device": "gpu"}}, r"offload_param\.device: got 'gpu': Input should be 'none', 'cpu' or"),
    ],
)
def test_what_deepspeed_refuses_is_told_with_file_field_and_reason(tmp_path, zero, message):
    path = write_json(tmp_path, zero_optimization={"stage": 3, **zero})
    with pytest.raises(ConfigError, match=r"1 fault in .*ds\.json':\n  - deepspeed\.zero_optimization\." + message):
        build(deepspeed_config=path)


def test_what_another_reader_of_deepspeeds_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"ds\.json':\n  - deepspeed: .*'sparse_gradients' flag would be ignored"):
        build(deepspeed_config=write_json(tmp_path, sparse_gradients=True))


def test_batch_sizes_that_agree_are_accepted(tmp_path):
    path = write_json(tmp_path, train_batch_size=8, train_micro_batch_size_per_gpu="auto")
    assert build(deepspeed_config=path).global_batch == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not valid JSON: .* line 1 column 2 .* cut off"),
        ("[]", "holds a list, want a JSON object"),
        ('{"bf16": {}, "zero_optimization": {"stage": 2, "stage": 3}}', r"ds\.json' has 'stage' more than once"),
        (None, "does not exist.*zero3_bf16.json"),
    ],
)
def test_an_unreadable_deepspeed_json(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        build(deepspeed_config=str(path))


def test_divergence_and_bad_samples_are_stated_in_the_config_or_on_the_command_line(tmp_path):
    run = build(write_config(tmp_path, "on_divergence = 'rollback'\nmax_rollbacks = 7\ndata = dict(max_bad_samples=2)"))
    assert (run.max_rollbacks, run.max_bad_samples) == (7, 2)
    assert (build().max_rollbacks, build().max_bad_samples) == (0, 0)
    assert build(on_divergence="rollback").max_rollbacks == 3
    with pytest.raises(ConfigError, match=r"on_divergence: got 'go', want 'stop' or 'rollback'"):
        build(write_config(tmp_path, "on_divergence = 'go'"))
    with pytest.raises(ConfigError, match=r"data\.max_bad_samples: got -1, want a whole number of at least 0"):
        build(write_config(tmp_path, "data = dict(max_bad_samples=-1)"))


def test_compiled_blocks_take_torchs_own_linear_function(tmp_path):
    assert not build().compile and "memory_efficient_linear" not in build().deepspeed["zero_optimization"]
    for run in (build(compile=True), build(write_config(tmp_path, "compile = True"))):
        assert run.compile and run.deepspeed["zero_optimization"]["memory_efficient_linear"] is False
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}))
    assert build(deepspeed_config=str(path)).deepspeed["zero_optimization"]["memory_efficient_linear"]
    with pytest.raises(ConfigError, match=r"memory_efficient_linear: got true, which torch\.compile can't see through"):
        build(deepspeed_config=str(path), compile=True)


def test_when_checkpoints_are_kept_and_how_they_are_written():
    run = build_with("checkpoint_config.interval=50", "checkpoint_config.keep_interval=200")
    assert run.checkpoints == CheckpointSettings(50, keep=2, keep_interval_steps=200, in_background=False)
    assert build().checkpoints.keep_interval_steps is None and build(checkpoint="async").checkpoints.in_background
    text = r"checkpoint_config\.keep_interval: got 70, but checkpoints are saved every 50 steps\. Use a multiple"
    with pytest.raises(ConfigError, match=text):
        build_with("checkpoint_config.interval=50", "checkpoint_config.keep_interval=70")


def test_how_many_checkpoints_stay():
    run = build_with("checkpoint_config.max_keep_ckpts=-1")
    assert run.checkpoints.keep == -1 and not run.notes
    with pytest.raises(ConfigError, match=r"max_keep_ckpts: got 0, want at least 1, or -1 for all"):
        build_with("checkpoint_config.max_keep_ckpts=0")
    run = build_with("checkpoint_config=None")
    assert run.checkpoints.keep == 2
    assert any("max_keep_ckpts is not set: the newest 2 checkpoints stay, where MMCV keeps all" in n for n in run.notes)


def test_gloo_sums_whole_buckets_and_copies_nothing_after_it():
    given = build("demo", 2).deepspeed
    cpu, gpu = (suit_device(given, device) for device in ("cpu", "cuda"))
    assert cpu["zero_optimization"]["reduce_scatter"] is False and cpu["prescale_gradients"]
    assert gpu == given
    scattered = {**given, "zero_optimization": {**given["zero_optimization"], "reduce_scatter": True}}
    assert suit_device(scattered, "cpu") == {**scattered, "prescale_gradients": False}
