import json

import numpy as np
import pytest
import torch

from ds_seg.checkpoint.description import describe_model_of, read_description
from ds_seg.config import RunOptions, build_run_config
from ds_seg.errors import ConfigError, WeightsError
from tiny_export import CLASSES, PALETTE, describe


def make_run(**overrides):
    return build_run_config(RunOptions("demo", cfg_options=overrides), world_size=1)


@pytest.mark.parametrize("form", ["to_header", "to_meta"])
def test_what_is_written_is_read_again(form):
    wanted = describe(dtype=torch.bfloat16)
    got = read_description("w.pth", getattr(wanted, form)())
    assert got == wanted
    assert isinstance(got.pipeline[1]["img_scale"], tuple)  # a list would be two scales


def test_a_header_is_text_and_a_meta_what_mmsegmentation_expects():
    header, meta = describe().to_header(), describe().to_meta()
    assert all(isinstance(value, str) for value in header.values())
    assert json.loads(header["CLASSES"]) == list(CLASSES) and meta["CLASSES"] == CLASSES
    assert json.loads(header["PALETTE"]) == meta["PALETTE"] == [list(colour) for colour in PALETTE]


def test_a_run_describes_its_model_without_what_only_training_reads():
    run = make_run()
    run.model.backbone.pretrained = "/home/somebody/weights.pth"
    run.model.decode_head.loss_decode.class_weight = "weights.npy"
    found = describe_model_of(run)
    assert "somebody" not in repr(found) and "weights.npy" not in repr(found)
    assert found.dtype == torch.bfloat16 and found.window_batch == run.evaluation.window_batch
    assert found.model["backbone"]["embed_dim"] == run.model.backbone.embed_dim
    assert found.model["test_cfg"] == dict(run.model.test_cfg)
    normalise = [step for step in found.pipeline[-1]["transforms"] if step["type"] == "Normalize"]
    assert normalise[0]["to_rgb"] is True and len(normalise[0]["mean"]) == 3
    assert len(found.classes) == len(found.palette) == 6
    assert read_description("w.safetensors", found.to_header()) == found


def test_numbers_of_numpy_become_plain_ones():
    run = make_run()
    run.model.decode_head.loss_decode.weight = np.array([1.0, 2.0])
    assert describe_model_of(run).model["decode_head"]["loss_decode"]["weight"] == [1.0, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), print])
def test_a_value_that_no_file_can_hold(value):
    run = make_run()
    run.model.decode_head.loss_decode.weights = [1.0, value]
    with pytest.raises(ConfigError, match=r"model\.decode_head\.loss_decode\.weights\[1\] is .* can't hold"):
        describe_model_of(run)


def test_an_ignored_id_of_ones_own_is_no_concern_of_a_model():
    described = describe_model_of(make_run(**{"model.decode_head.ignore_index": 7}))
    assert described.model["decode_head"]["ignore_index"] == 7


def test_a_head_with_another_number_of_classes_than_the_dataset():
    with pytest.raises(ConfigError, match=r"model\.decode_head\.num_classes is 5, but data\.test .* has 6 classes"):
        describe_model_of(make_run(**{"model.decode_head.num_classes": 5}))


def test_a_file_that_is_no_export():
    with pytest.raises(WeightsError, match=r"w\.pth was not exported by ds-seg.*ds-seg export CONFIG CHECKPOINT"):
        read_description("w.pth", {"CLASSES": CLASSES})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{'version': 2}", "ValueError: layout 2, known is 1"),
        ("{'version': 1}", "KeyError: 'model'"),
        ("{'version': ", "SyntaxError"),
        ("open('/etc/passwd')", "ValueError: malformed node"),
    ],
)
def test_a_description_that_can_not_be_read(text, fault):
    meta = {**describe().to_header(), "ds_seg": text}
    with pytest.raises(WeightsError, match=rf"w\.pth describes its model in a way .*{fault}.*Export the checkpoint ag"):
        read_description("w.pth", meta)
