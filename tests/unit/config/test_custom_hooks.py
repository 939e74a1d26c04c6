import pytest

from ds_seg.config import EmaSettings, RunOptions, build_run_config
from ds_seg.errors import ConfigError


def build(hooks, **options):
    return build_run_config(RunOptions("demo", cfg_options={"custom_hooks": hooks}, **options), 1)


def test_averages_are_off_by_default():
    assert build_run_config(RunOptions("demo"), 1).ema is None
    assert build([]).ema is None


def test_an_ema_hook_is_read_with_mmcvs_defaults():
    assert build([dict(type="EMAHook")]).ema == EmaSettings(momentum=0.0002, interval_steps=1, warm_up_steps=100)
    hook = dict(type="EMAHook", momentum=0.01, interval=5, warm_up=1, resume_from=None)
    assert build([hook]).ema == EmaSettings(momentum=0.01, interval_steps=5, warm_up_steps=1)


def test_hooks_without_meaning_are_noted():
    run = build([dict(type="ToBFloat16Hook", priority=49), dict(type="EMAHook", priority="ABOVE_NORMAL")])
    assert run.ema == EmaSettings(0.0002, 1, 100)
    precision, priority = run.notes
    assert precision.startswith("config key 'custom_hooks[0]' has no effect: ToBFloat16Hook changes a precision that")
    assert priority == "config key 'custom_hooks[1].priority' has no effect: averages move right after the step"


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"type": "EMAHook"}, r"custom_hooks: got \{'type': 'EMAHook'\}, want a list of dicts"),
        (["EMAHook"], r"custom_hooks\[0\]: got 'EMAHook', want a dict of type 'EMAHook', or 'ToBFloat16Hook'"),
        ([dict(type="NumClassCheckHook")], r"got 'NumClassCheckHook'.*Hooks of other types are not run: remove it"),
        ([dict(momentum=0.1)], r"custom_hooks\[0\]: got \{'momentum': 0\.1\}, want a dict of type 'EMAHook'"),
        ([dict(type="EMAHook")] * 2, r"custom_hooks\[1\]: is a second EMAHook\. Keep one"),
        ([dict(type="EMAHook", momentum=1.5)], r"custom_hooks\[0\]\.momentum: got 1\.5, want between 0 and 1"),
        ([dict(type="EMAHook", momentum=0)], r"custom_hooks\[0\]\.momentum: got 0, want a number above 0 and below 1"),
        ([dict(type="EMAHook", momentum=1.0)], r"momentum: got 1\.0, want a number above 0 and below 1"),
        ([dict(type="EMAHook", momentum="fast")], r"momentum: got 'fast', want a number"),
        ([dict(type="EMAHook", interval=0)], r"\.interval: got 0, want a whole number of at least 1"),
        ([dict(type="EMAHook", warm_up=0)], r"\.warm_up: got 0, want a whole number of at least 1"),
        ([dict(type="EMAHook", decay=0.999)], r"custom_hooks\[0\]\.decay: unknown key.*Known here: .*momentum"),
        ([dict(type="EMAHook", resume_from="a.pth")], r"resume_from: got 'a\.pth'; averages come back with --resume"),
    ],
)
def test_each_mistake_is_named_with_its_field(hooks, message):
    with pytest.raises(ConfigError, match=message):
        build(hooks)
