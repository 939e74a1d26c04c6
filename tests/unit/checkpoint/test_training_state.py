import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from ds_seg.checkpoint import TrainingState
from ds_seg.checkpoint.training_state import (
    STATE_FILE,
    Rollback,
    describe_model,
    read_state,
    validate_same_model,
    validate_same_rates,
)
from ds_seg.data.bad_samples import BadSample
from ds_seg.errors import CheckpointError
from saved import make_checkpoint


def test_the_full_shape_of_a_sharded_parameter_and_the_heads_buffers_are_described():
    backbone, heads = nn.Linear(3, 2, bias=False), nn.BatchNorm2d(4)
    backbone.weight.data = torch.empty(0)
    backbone.weight.ds_shape = torch.Size((2, 3))
    described = describe_model(backbone, heads)
    assert described["backbone"] == {"weight": [2, 3]}
    assert described["heads"]["running_mean"] == [4] and described["heads"]["num_batches_tracked"] == []


@pytest.mark.parametrize(
    ("backbone", "heads", "text"),
    [
        (
            nn.Linear(3, 5),
            nn.Linear(2, 2),
            r"backbone parameter 'weight' has shape \[2, 3\] there and \[5, 3\] in this",
        ),
        (
            nn.Linear(3, 2, bias=False),
            nn.Linear(2, 2),
            r"'bias' has shape \[2\] there and none .*\(2 against 1 tensors\)",
        ),
        (
            nn.Linear(3, 2),
            nn.Linear(2, 2, bias=False),
            r"heads parameter 'bias' .* it lies beside it as \.\./\.\./config",
        ),
    ],
)
def test_another_model_is_refused_by_the_first_parameter_that_differs(tmp_path, backbone, heads, text):
    content = {"model": describe_model(nn.Linear(3, 2), nn.Linear(2, 2))}
    validate_same_model(tmp_path, content, nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=text):
        validate_same_model(tmp_path, content, backbone, heads)


@pytest.mark.parametrize(("content", "fault"), [(None, "is missing"), ("{}", r"has 2 bytes, want 11")])
def test_a_state_file_that_is_not_the_one_saved_is_named(tmp_path, content, fault):
    state = make_checkpoint(tmp_path, 5, '{"seed": 0}') / STATE_FILE
    state.unlink() if content is None else state.write_text(content)
    with pytest.raises(CheckpointError, match=rf"step_000005 is damaged: state\.json {fault}\. .* start over"):
        read_state(state.parent)


def test_a_checkpoint_from_before_averages_has_none(tmp_path):
    assert read_state(make_checkpoint(tmp_path, 1, '{"seed": 0}')) == {"seed": 0, "averaged": False}
    assert read_state(make_checkpoint(tmp_path, 2, '{"averaged": true}')) == {"averaged": True}


def test_a_state_that_knew_mIoU_alone_is_read(tmp_path):
    text = '{"state": {"step": 3, "best_mIoU": 0.4, "best_checkpoint": "step_000002"}}'
    state = read_state(make_checkpoint(tmp_path, 3, text))["state"]
    assert TrainingState(**state) == TrainingState(3, best_score=0.4, best_metric="mIoU", best_checkpoint="step_000002")


def test_state_survives_its_file_form():
    state = TrainingState(step=7, scheduled_steps=5, skipped_steps=2, best_score=0.25, best_checkpoint="step_000004")
    assert TrainingState(**asdict(state)) == state


def make_groups(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), names=("backbone.cls_token", "backbone.norm.bias")):
    """The backbone's groups, which share betas and eps with the heads'."""
    layers = [{"base_lr": lr * 0.5**i, "weight_decay": weight_decay, "names": [name]} for i, name in enumerate(names)]
    head = {"base_lr": lr, "weight_decay": 0.0, "names": ["decode_head.conv_seg.weight"], "betas": betas, "eps": 1e-8}
    return [*layers, head]


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (make_groups(lr=2e-3), r"3 parameters .* the first is backbone\.cls_token: lr 0\.002, .* there, lr 0\.001, "),
        (make_groups(weight_decay=0.1), r"2 parameters .* lr 0\.001, weight decay 0\.1 there, .* decay 0\.05 here\."),
        (make_groups(betas=(0.9, 0.95)), r"1 parameters .*conv_seg\.weight: .*betas \(0\.9, 0\.95\), eps 1e-08 there"),
        (make_groups(names=("backbone.cls_token",)), r"norm\.bias: not trained there, lr 0\.0005, .* Freeze the same"),
        (
            make_groups(names=("backbone.cls_token", "backbone.norm.bias", "backbone.a")),
            r"backbone\.a: .* not trained here",
        ),
    ],
)
def test_parameters_that_were_trained_in_another_way_are_named(tmp_path, saved, text):
    validate_same_rates(tmp_path, make_groups(), make_groups())
    with pytest.raises(CheckpointError, match=text):
        validate_same_rates(tmp_path, saved, make_groups())


def test_a_state_comes_back_from_its_file_with_what_was_left_out_and_replaced():
    state = TrainingState(
        step=9,
        train_images=16,
        bad_samples=[BadSample(3, "a.jpg", "truncated")],
        rollbacks=[Rollback(3, 4, 5), Rollback(6, 4, 5)],
    )
    assert TrainingState(**json.loads(json.dumps(asdict(state)))) == state
    assert state.left_out == [(4, 5), (6, 7)]
    assert TrainingState(step=3, scheduled_steps=3, skipped_steps=0, best_score=None).left_out == []  # an older file


def test_another_number_of_training_images_is_refused():
    state = TrainingState()
    state.note_train_images(16)
    state.note_train_images(16)
    with pytest.raises(
        CheckpointError, match=r"from 16 training images, but there are 15 here: every .*with --load-from"
    ):
        state.note_train_images(15)
