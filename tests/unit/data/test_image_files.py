import os

import pytest
from PIL import Image

from ds_seg.data.images import find_images, inference_section, open_images
from ds_seg.errors import ConfigError, DataError

STREET = {"type": "CamVidDataset", "pipeline": []}


@pytest.fixture
def folder(tmp_path):
    for name in ("frame.0001.jpg", "frame.0002.jpg", "night/frame.0001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def test_dots_in_names_are_kept(folder):
    found = find_images([str(folder)])
    assert sorted(map(str, found.values())) == ["frame.0001.png", "frame.0002.png", "night/frame.0001.png"]
    single = folder / "frame.0002.jpg"
    assert {str(path): str(result) for path, result in find_images([str(single)]).items()} == {
        str(single): "frame.0002.png"
    }


def test_images_of_the_formats_that_datasets_come_in_are_found(tmp_path):
    for suffix in ("gif", "ppm", "TIF"):
        Image.new("RGB", (2, 2)).save(tmp_path / f"a{suffix}.{suffix}")
    (tmp_path / "notes.txt").write_text("no image")
    assert len(find_images([str(tmp_path)])) == 3


def test_folders_and_pipes_with_an_image_s_name_are_passed_over_and_broken_links_are_not(folder):
    (folder / "frame.0003.jpg").mkdir()
    os.mkfifo(folder / "frame.0004.jpg")
    (folder / "frame.0005.jpg").symlink_to(folder / "gone.jpg")
    assert sorted(path.name for path in find_images([str(folder)])) == [
        *("frame.0001.jpg", "frame.0001.jpg", "frame.0002.jpg", "frame.0005.jpg")
    ]


def test_two_images_never_write_one_result(folder):
    with pytest.raises(
        DataError, match=r"frame\.0001\.jpg and .*night/frame\.0001\.jpg would both write frame\.0001\.png"
    ):
        find_images([str(folder / "frame.0001.jpg"), str(folder / "night/frame.0001.jpg")])


def test_the_first_dataset_in_lists_and_wrappers_counts():
    other = {"type": "ADE20KDataset", "pipeline": []}
    assert inference_section({"val": STREET}) == STREET
    assert inference_section({"val": other, "test": [STREET, other]}) == STREET
    assert inference_section({"test": {"type": "RepeatDataset", "times": 1, "dataset": STREET}}) == STREET
    assert inference_section({"test": {"type": "MultiImageMixDataset", "datasets": [STREET, other]}}) == STREET


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "CamVidDatset", "pipeline": []}, r"data\.test\.type is 'CamVidDatset', .*Nearest: CamVidDataset"),
        (
            {"type": "CustomDataset", "pipeline": []},
            r"data\.test\.classes is not set, and CustomDataset has no classes",
        ),
        ({**STREET, "pipeline": [{"type": "Nowhere"}]}, r"data\.test\.pipeline\[0\]\.type is 'Nowhere'"),
    ],
)
def test_a_dataset_that_can_not_be_named_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        open_images({"test": section}, [])
