from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_seg.config import CONFIGS_ROOT, read_config_file
from ds_seg.data.build import build_dataset, resolve_sample

MakeCfg = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_label_0_means_the_same_in_training_and_evaluation(make_cfg: MakeCfg, reduce_zero_label: bool) -> None:
    cfg = make_cfg(type="FoldersDataset", classes=list("abcdefghijk"), reduce_zero_label=reduce_zero_label)
    before = [dict(step) for step in cfg["pipeline"]]
    dataset = build_dataset(cfg, role="train")
    leaf, _ = resolve_sample(dataset, 0)
    assert leaf.reduce_zero_label is reduce_zero_label
    assert leaf.pipeline.transforms[1].reduce_zero_label is reduce_zero_label
    assert cfg["pipeline"] == before
    assert dataset[0]["gt_semantic_seg"].data.shape == (1, 28, 28)


def test_the_template_takes_the_changes_that_its_page_names(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"_base_ = {str(CONFIGS_ROOT / 'runs/own_data.py')!r}\n"
        f"mine = dict(data_root={str(folder)!r}, classes=list('abcdefghijk'), reduce_zero_label=True,\n"
        "            palette=[[i, i, i] for i in range(11)])\n"
        "here = dict(mine, img_dir='images/train', ann_dir='annotations/train', split=None)\n"
        "data = dict(train=here, val=here, test=here)\n"
    )
    config = read_config_file(path, {})
    for role in ("train", "val", "test"):
        dataset = build_dataset(config.data[role], role=role)
        assert len(dataset) == 7 and dataset.reduce_zero_label and len(dataset.CLASSES) == 11
        assert np.array_equal(dataset.PALETTE[10], [10, 10, 10])
