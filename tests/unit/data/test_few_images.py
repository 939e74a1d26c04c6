import pytest

from ds_seg.data.build import build_dataset, leaf_datasets, sample_paths
from ds_seg.data.few_images import draw_images
from ds_seg.errors import ConfigError


def test_a_draw_is_the_same_every_time_and_in_order():
    drawn = draw_images(20210, 20210 // 16)
    assert drawn == draw_images(20210, 1263) == sorted(set(drawn)) and len(drawn) == 1263
    assert drawn[:3] != [0, 1, 2]
    assert draw_images(5, 9) == [0, 1, 2, 3, 4]


def test_a_dataset_uses_that_many_images(make_cfg):
    dataset = build_dataset(make_cfg(max_image_num=3), role="train")
    assert len(dataset) == 3
    assert [sample_paths(dataset, index)[0][-5] for index in range(3)] == [str(i) for i in draw_images(7, 3)]
    assert len(build_dataset(make_cfg(max_image_num=None), role="train")) == 7
    assert build_dataset(make_cfg("val", max_image_num=2), role="val").test_mode


def test_inside_wrappers_and_of_each_folder(make_cfg):
    repeated = {"type": "RepeatDataset", "times": 2, "dataset": make_cfg(max_image_num=3)}
    folders = make_cfg(img_dir=["images/train"] * 2, ann_dir=["annotations/train"] * 2, max_image_num=2)
    dataset = build_dataset([repeated, folders], role="train")
    assert len(dataset) == 10 and [len(leaf) for leaf in leaf_datasets(dataset)] == [3, 2, 2]


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "all"])
def test_a_count_that_is_none_is_refused(make_cfg, count):
    with pytest.raises(ConfigError, match=r"data\.train\.max_image_num: got .*, want a number of images of at least 1"):
        build_dataset(make_cfg(max_image_num=count), role="train")
