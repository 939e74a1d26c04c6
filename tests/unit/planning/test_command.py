from types import SimpleNamespace

import pytest

from ds_seg.config import RunOptions, build_run_config
from ds_seg.planning.candidates import Batch
from ds_seg.planning.command import build_train_arguments

STEPS = 1000
POLICIES = {
    "step": {"policy": "step", "step": [400, 700]},
    "one step": {"policy": "step", "step": 400, "warmup": "linear", "warmup_iters": 10},
    "periods": {"policy": "CosineRestart", "min_lr": 0.0, "periods": [600, 400], "restart_weights": [1, 1]},
}


def plan(run, gpus, max_steps, checkpointing):
    batch = Batch(gpus, run.micro_batch, run.accumulation_steps, max_steps)
    return SimpleNamespace(batch=batch, checkpointing=checkpointing, states=SimpleNamespace(zero={"stage": 3}))


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("step", ["lr_config.step=[100,175]"]),
        ("one step", ["lr_config.warmup_iters=3", "lr_config.step=100"]),
        ("periods", ["lr_config.periods=[150,100]"]),
    ],
)
def test_what_is_counted_in_steps_shrinks_with_the_run(policy, wanted):
    options = {"runner.max_iters": STEPS, "lr_config": {"_delete_": True, **POLICIES[policy]}}
    run = build_run_config(RunOptions("demo", cfg_options=options), 1)
    arguments = build_train_arguments(run, "demo", [], plan(run, 4, STEPS // 4, "none"))
    assert arguments[-len(wanted) :] == wanted and f"runner.max_iters={STEPS // 4}" in arguments


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"with_cp": True, "checkpointing": None}, []),
        (
            {"with_cp": False, "checkpointing": None},
            ["model.backbone.checkpointing=block", "model.backbone.with_cp=True"],
        ),
        ({"checkpointing": "auto"}, ["model.backbone.checkpointing=block"]),
        ({"checkpointing": "block"}, []),
    ],
)
def test_a_policy_that_the_config_has_is_not_asked_for(given, wanted):
    changes = {f"model.backbone.{key}": value for key, value in given.items()}
    run = build_run_config(RunOptions("demo", cfg_options=changes), 1)
    arguments = build_train_arguments(run, "demo", [], plan(run, 1, run.schedule.max_steps, "block"))
    assert arguments == ["demo", *(["--cfg-options", *wanted] if wanted else [])]
