"""Datasets given as lists, and the loader settings of MMSegmentation 0.30."""

import copy

import pytest

from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config, read_config_file
from ds_seg.config.data_section import evaluation_role
from ds_seg.config.overrides import parse_overrides
from ds_seg.errors import ConfigError
from ds_seg.session import enable_test_time_augmentation

DEMO = CONFIGS_ROOT / "runs" / "demo.py"


def build(*pairs, **lists):
    return build_run_config(RunOptions("demo", cfg_options={**parse_overrides(pairs), **lists}), 2)


def copies(role):
    dataset = read_config_file(DEMO, {}).data[role].to_dict()
    return [dataset, copy.deepcopy(dataset)]


def test_a_list_of_training_sets_has_one_crop():
    train = copies("train")
    for dataset in train:
        dataset["pipeline"][6]["size"] = None
    train[0]["pipeline"][3]["crop_size"] = [56, 70]
    train[1] = {"type": "RepeatDataset", "times": 2, "dataset": train[1]}
    train[1]["dataset"]["pipeline"][3]["crop_size"] = (56, 70)
    assert build(**{"data.train": train}).train_crop_px == (56, 70)
    train[1]["dataset"]["pipeline"][3]["crop_size"] = (70, 70)
    with pytest.raises(
        ConfigError, match=r"data\.train\[1\]: has crop_size \(70, 70\), but data\.train\[0\] has \(56, 70\)"
    ):
        build(**{"data.train": train})
    train[1]["dataset"]["pipeline"][3]["crop_size"] = (50, 70)
    with pytest.raises(
        ConfigError, match=r"data\.train\[1\]\.dataset\.pipeline\[3\]\.crop_size: got \(50, 70\), want mul"
    ):
        build(**{"data.train": train})


def test_crops_are_filled_up_to_their_own_size():
    other = "data.train.pipeline.{}=[56,70]"
    with pytest.raises(
        ConfigError, match=r"pipeline\[6\]\.size: got \(112, 112\), but RandomCrop cuts \(56, 70\)\. Give"
    ):
        build(other.format("3.crop_size"))
    assert build(other.format("3.crop_size"), other.format("6.size")).train_crop_px == (56, 70)
    assert build(other.format("3.crop_size"), "data.train.pipeline.6.size=None").train_crop_px == (56, 70)


@pytest.mark.parametrize("role", ["val", "test"])
def test_a_list_of_sets_to_evaluate_has_one_pipeline(role):
    run = build(**{f"data.{role}": copies(role)})
    enable_test_time_augmentation(run, role)
    assert [part["pipeline"][1]["flip"] for part in run.data[role]] == [True, True]
    other = copies(role)
    other[1]["pipeline"][1]["img_scale"] = (56, 56)
    with pytest.raises(ConfigError, match=rf"data\.{role}\[1\]\.pipeline: differs from data\.{role}\[0\]'s"):
        build(**{f"data.{role}": other})


@pytest.mark.parametrize("pair", ["data.train=[]", "data.val=[1,2]", "data.test=5"])
def test_what_is_no_dataset(pair):
    with pytest.raises(
        ConfigError, match=r"data\.(train|val|test): missing; give the MMSeg dataset .* or a list of them"
    ):
        build(pair)


@pytest.mark.parametrize("key", ["train_dataloader", "val_dataloader"])
def test_loader_sections_name_the_keys_to_use(key):
    with pytest.raises(
        ConfigError, match=rf"1 fault .*\n.*data\.{key}: is not read\. .*samples_per_gpu and workers_per"
    ):
        build(f"data.{key}.samples_per_gpu=2")


@pytest.mark.parametrize("test", [None, {}, []])
def test_evaluations_read_val_where_there_is_no_test(test):
    assert evaluation_role({"test": test, "val": {"type": "A"}}) == evaluation_role({"val": {"type": "A"}}) == "val"
    assert evaluation_role({"test": {"type": "B"}, "val": {"type": "A"}}) == "test"
