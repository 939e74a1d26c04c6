"""The user's mistakes: exit code 2, one message with the remedy, said once, and no traceback."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ds_seg.config import CONFIGS_ROOT

TRAIN_IMAGE = "images/training/scene_00003.jpg"
TRAIN_LABEL = "annotations/training/scene_00003.png"


@pytest.fixture
def own_scenes(cli, scenes, tmp_path):
    """A copy of the dataset that a test may damage."""
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    cli.env["DS_SEG_DEMO_ROOT"] = str(root)
    return root


def assert_refused(done, *parts):
    """One message, once, with code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("ds-seg: ") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def damage_nothing(_root: Path) -> None:
    """Leave the dataset alone."""


def remove_folder(root: Path) -> None:
    shutil.rmtree(root / "images" / "training")


def remove_label(root: Path) -> None:
    (root / TRAIN_LABEL).unlink()


def write_wrong_id(root: Path) -> None:
    label = cv2.imread(str(root / TRAIN_LABEL), cv2.IMREAD_UNCHANGED)
    label[5, 7] = 9
    cv2.imwrite(str(root / TRAIN_LABEL), label)


def truncate_image(root: Path) -> None:
    content = (root / TRAIN_IMAGE).read_bytes()
    (root / TRAIN_IMAGE).write_bytes(content[: len(content) // 2])


def shrink_label(root: Path) -> None:
    cv2.imwrite(str(root / TRAIN_LABEL), np.ones((20, 30), np.uint8))


@pytest.mark.parametrize(
    ("damage", "options", "parts"),
    [
        (remove_folder, [], ["data.train.img_dir", "images/training"]),
        (remove_label, [], ["without an annotation", "scene_00003.png"]),
        (write_wrong_id, [], ["scene_00003.png", "9", "num_classes"]),
        (truncate_image, [], ["scene_00003.jpg", "truncated"]),
        (shrink_label, [], ["scene_00003.png", "30 x 20 px"]),
        (damage_nothing, ["model.decode_head.num_classes=5"], ["num_classes is 5", "has 6 classes"]),
        (
            damage_nothing,
            ["model.decode_head.in_channels=64", "model.decode_head.channels=64"],
            ["model.decode_head.in_channels", "64", "48"],
        ),
        (damage_nothing, ["model.backbone.embed_dmi=8"], ["model.backbone", "embed_dmi"]),
        (damage_nothing, ["model.backbone.in_chans=1"], ["in_chans is 1", "images of 3 channels", "'grayscale' 1"]),
        (damage_nothing, ["load_from=absent.pth"], ["absent.pth"]),
        (
            damage_nothing,
            ["model.decode_head.loss_decode.type=CrossEntropyLos"],
            ["model.decode_head", "CrossEntropyLos"],
        ),
    ],
)
def test_mistakes_in_data_and_config(cli, own_scenes, tiny_config, tmp_path, damage, options, parts):
    damage(own_scenes)
    arguments = ["train", tiny_config, "--work-dir", tmp_path / "run"]
    assert_refused(cli(*arguments, *(["--cfg-options", *options] if options else [])), *parts)
    assert not (tmp_path / "run" / "summary.json").exists()


ODD_SIZE = """
_base_ = {base!r}
steps = [dict(type='Resize', keep_ratio=False), dict(type='ImageToTensor', keys=['img'])]
collect = dict(type='Collect', keys=['img'])
views = dict(type='MultiScaleFlipAug', img_scale=(60, 60), flip=False, transforms=[*steps, collect])
data = dict(val=dict(pipeline=[dict(type='LoadImageFromFile'), views]))
"""


def test_what_a_step_can_not_use_is_found_before_weights_are_loaded(cli, tiny_config, tmp_path):
    config = tmp_path / "uncollected.py"
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True)]
    config.write_text(f"_base_ = {str(tiny_config)!r}\ndata = dict(train=dict(pipeline={steps}))\n")
    done = cli("train", config, "--work-dir", tmp_path / "run")
    assert_refused(done, "data.train.pipeline does not collect an image")
    assert not (tmp_path / "run").exists()


def test_what_an_evaluation_can_not_use_is_found_before_the_first_step(cli, tiny_config, tmp_path):
    odd = tmp_path / "odd.py"
    odd.write_text(ODD_SIZE.format(base=str(tiny_config)))
    assert_refused(cli("train", odd, "--work-dir", tmp_path / "run"), "a window of 60x60 px", "ResizeToMultiple")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_windows_that_cover_no_image_are_found_before_weights_are_read(
    cli, trained, tiny_config, scenes, tmp_path, command
):
    slide = ("model.test_cfg.mode=slide", "model.test_cfg.crop_size=[56,56]", "model.test_cfg.stride=[70,56]")
    images = [scenes / "images" / "validation", "--out", tmp_path / "out"] if command == "predict" else []
    done = cli(command, tiny_config, trained, *images, "--cfg-options", *slide)
    assert_refused(done, "crop_size (56, 56) with stride (70, 56) can't cover an image")
    assert "loaded" not in done.stdout


def test_a_mistake_is_said_once_by_two_processes(cli, own_scenes, tiny_config, tmp_path):
    write_wrong_id(own_scenes)
    assert_refused(cli("train", tiny_config, processes=2), "scene_00003.png")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 99}))
    assert_refused(
        cli("train", tiny_config, "--deepspeed_config", path, processes=2),
        "deepspeed.zero_optimization.stage: got 2, want 3",
        "deepspeed.train_batch_size: got 99",
    )


def test_a_damaged_image_found_while_training_is_named_by_the_rank_that_read_it(cli, own_scenes, tiny_config):
    path = own_scenes / "annotations/training/scene_00014.png"  # of the second step
    path.write_bytes(path.read_bytes()[:100])
    done = cli("train", tiny_config, "--cfg-options", "check_data=False", processes=2)
    assert_refused(done, path.name)
    assert "step 1/12" in done.stdout and "step 2/12" not in done.stdout


def test_checkpoints_that_do_not_fit(cli, trained, tiny_config, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(f"_base_ = {str(tiny_config)!r}\nmodel = dict(backbone=dict(depth=3, out_indices=[2]))\n")
    assert_refused(cli("evaluate", other, trained), "is of another model", "blocks.2.")
    assert_refused(cli("evaluate", tiny_config, tmp_path / "nowhere"), "nowhere' does not exist")
    resume = ["train", tiny_config, "--work-dir", trained, "--resume", "auto"]
    assert_refused(cli(*resume, "--seed", 3), "seed: 0 there, 3 here", "--load-from")
    assert_refused(cli("train", tiny_config, "--work-dir", trained, "--resume", "step_99"), "step_99", "step_000012")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != "run.lock"}
    assert_refused(
        cli("train", tiny_config, "--work-dir", trained, "--load-from", "typo.pth"), "typo.pth does not exist"
    )
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != "run.lock"}


def test_a_flipped_bit_in_a_checkpoint_is_found_before_it_is_loaded(cli, trained, tiny_config, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (shard,) = (tmp_path / "run" / "checkpoints" / "step_000012").rglob("*optim_states.pt")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    resume = ("train", tiny_config, "--work-dir", tmp_path / "run", "--resume")
    assert_refused(cli(*resume, "step_000012"), shard.name, "has another checksum", "step_000006")
    fallen_back = cli(*resume, "auto")
    assert fallen_back.returncode == 0, fallen_back.stderr
    assert "passes over a damaged checkpoint" in fallen_back.stdout + fallen_back.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["resumed_from"].endswith("step_000006") and summary["steps"] == 12


def test_predicting_what_is_no_image(cli, trained, tiny_config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.jpg").write_text("no image")
    out = ["--out", tmp_path / "out"]
    assert_refused(cli("predict", tiny_config, trained, tmp_path / "absent.jpg", *out), "absent.jpg does not exist")
    assert_refused(cli("predict", tiny_config, trained, tmp_path / "empty", *out), "holds no image")
    assert_refused(cli("predict", tiny_config, trained, tmp_path / "note.jpg", *out), "note.jpg", "not an image")
    assert not (tmp_path / "out").exists()


def test_the_shipped_configs_are_where_the_message_says():
    assert (CONFIGS_ROOT / "deepspeed" / "zero3_bf16.json").is_file()
