"""What the commands share, in this process: the views of test-time augmentation, and loading weights."""

import numpy as np
import pytest
import torch

from ds_seg.config import RunOptions, build_run_config
from ds_seg.data.images import ArrayPipeline, inference_section, open_images
from ds_seg.errors import ConfigError
from ds_seg.models import build_heads
from ds_seg.models.backbone_building import build_backbone
from ds_seg.session import enable_test_time_augmentation, load_weights


def sides_px(config, *shape_px):
    """Short sides of the views of an image, each of which must come with its mirror image."""
    run = build_run_config(RunOptions(config), 1, with_engines=False)
    enable_test_time_augmentation(run, "test" if "test" in run.data else "val")
    pipeline = ArrayPipeline(inference_section(run.data)["pipeline"])
    views = [
        (min(image.shape[-2:]), meta["flip"]) for image, meta in pipeline(0, np.zeros((*shape_px, 3), np.uint8)).views
    ]
    assert views == [(side, mirrored) for side, _ in views[::2] for mirrored in (False, True)]
    return [side for side, _ in views[::2]]


def test_augmented_views_are_of_six_scales():
    assert sides_px("demo", 280, 336) == [140, 210, 280, 350, 420, 490]


def test_views_of_a_fixed_size_are_multiples_of_the_patch():
    assert sides_px("camvid_dinov2s_full", 360, 480) == [182, 280, 364, 462, 546, 644]


def test_no_view_is_smaller_than_min_size():
    assert sides_px("internvit6b_224_full_linear_ade20k", 512, 683) == [504, 504, 504, 630, 756, 882]


@pytest.mark.parametrize("reordered", [True, False])
def test_classes_of_a_weight_file_in_another_order_are_told_of(tmp_path, reordered):
    run = build_run_config(RunOptions("demo"), 1, with_engines=False)
    backbone, heads = build_backbone(run.model), build_heads(run.model)
    names = list(open_images(run.data, []).CLASSES)
    classes = [names[0], *reversed(names[1:])] if reordered else names
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()} | heads.state_dict()
    torch.save({"state_dict": state, "meta": {"CLASSES": classes}}, tmp_path / "w.pth")
    lines = []
    load_weights(run, backbone, heads, str(tmp_path / "w.pth"), training=False, log=lines.append)
    told = [line for line in lines if line.startswith("warning: class")]
    assert len(told) == reordered
    assert not told or f"class 1 is '{names[-1]}' in the file and '{names[1]}' in the dataset" in told[0]


def test_a_pipeline_without_the_step_that_makes_views_is_refused():
    run = build_run_config(RunOptions("demo"), 1, with_engines=False)
    run.data.val.pipeline = [step for step in run.data.val.pipeline if step["type"] != "MultiScaleFlipAug"]
    with pytest.raises(ConfigError, match=r"--tta: data\.val\.pipeline has no MultiScaleFlipAug step"):
        enable_test_time_augmentation(run, "val")
