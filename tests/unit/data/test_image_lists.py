import pytest

from ds_seg.data.build import build_dataset, leaf_datasets, sample_paths
from ds_seg.data.image_lists import draw_images, find_encoding_fault
from ds_seg.errors import ConfigError, DataError


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


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_and_a_byte_order_mark_are_no_names(make_cfg, folder, mark):
    (folder / "train.txt").write_bytes(mark + b"street_1\r\n\r\nstreet_0\n  \n\n")
    (folder / "more.txt").write_bytes(mark + b"\nstreet_2\n")
    dataset = build_dataset(make_cfg(split="train.txt"), role="train")
    names = [[path[-12:] for path in sample_paths(dataset, index)] for index in range(len(dataset))]
    assert names == [["street_1.jpg", "street_1.png"], ["street_0.jpg", "street_0.png"]]
    both = make_cfg(split=["train.txt", "more.txt"], ann_dir=["annotations/train"] * 2)
    assert len(build_dataset(both, role="train")) == 3
    repeated = {"type": "RepeatDataset", "times": 2, "dataset": make_cfg(split="train.txt")}
    assert len(build_dataset(repeated, role="train")) == 4
    assert len(build_dataset(make_cfg("test", split="train.txt", ann_dir=None), role="test")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("street_0\n".encode("utf-16"), r"train\.txt is UTF-16 text, as PowerShell's > writes it\. Save it as UTF-8"),
        ("street_0\nbäume\n".encode("latin-1"), r"line 2 of .*train\.txt is not UTF-8 text\. Save the file as UTF-8"),
    ],
)
def test_a_split_file_in_another_encoding(make_cfg, folder, content, message):
    (folder / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"^data\.train\.split: .*{message}"):
        build_dataset(make_cfg(split="train.txt"), role="train")


def test_a_split_file_that_can_not_be_opened(tmp_path):
    assert find_encoding_fault(tmp_path) is None
