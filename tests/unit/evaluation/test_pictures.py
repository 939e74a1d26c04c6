"""Pictures: overlays tint, comparisons show every class present, masks keep their ids."""

from __future__ import annotations

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from ds_seg.errors import DataError
from ds_seg.evaluation.pictures import draw_comparison, draw_overlay, load_rgb, name_picture, save_mask, save_picture

PALETTE = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
NAMES = ["road", "sky", "tree"]


def test_an_overlay_mixes_image_and_class_colour():
    image = np.full((6, 6, 3), 100, np.uint8)
    overlay = draw_overlay(image, np.ones((6, 6), np.uint8), PALETTE, opacity=0.5)

    assert overlay.dtype == np.uint8
    assert overlay[2, 2].tolist() == [50, 150, 50]


def test_borders_are_darker_and_ignored_pixels_black():
    labels = np.zeros((4, 8), np.uint8)
    labels[:, 4:] = 255
    overlay = draw_overlay(np.zeros((4, 8, 3), np.uint8), labels, PALETTE, opacity=1.0)

    assert overlay[0, 0].tolist() == [200, 0, 0]
    assert overlay[0, 3].tolist() == [100, 0, 0]
    assert overlay[0, 6].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("with_label", "panels"), [(True, 3), (False, 2)])
def test_a_comparison_has_a_panel_each_and_a_legend_of_the_classes_present(with_label, panels):
    image, prediction = np.zeros((160, 320, 3), np.uint8), np.zeros((160, 320), np.int64)
    label = np.full((160, 320), 2, np.uint8) if with_label else None
    picture = draw_comparison(image, prediction, label, PALETTE, NAMES)

    assert picture.shape[1] == panels * 330 + 10
    legend = picture[30 + 160 + 10 :].reshape(-1, 3).tolist()
    assert [200, 0, 0] in legend
    assert ([0, 0, 200] in legend) == with_label
    assert [0, 200, 0] not in legend


def test_letters_with_accents_have_a_shape_of_their_own():
    """A font without a letter draws the same box for each."""
    black, ids = np.zeros((160, 320, 3), np.uint8), np.zeros((160, 320), np.int64)
    legends = {draw_comparison(black, ids, None, PALETTE, [letter]).tobytes() for letter in "äößéΩЖ"}
    assert len(legends) == 6


@pytest.mark.parametrize(
    ("size", "panel"), [((2048, 4096), (512, 1024)), ((2000, 33), (1024, 320)), ((1, 9000), (1, 1024))]
)
def test_panels_of_large_images_are_reduced(size, panel):
    picture = draw_comparison(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), None, PALETTE, NAMES)
    height, width = panel
    assert picture.shape == (30 + height + 10 + 26 + 10, 2 * (width + 10) + 10, 3)


def test_a_class_whose_letters_the_font_lacks_is_named_by_its_id():
    ids = np.full((4, 4), 1, np.uint8)
    chinese, number = (
        draw_comparison(np.zeros((4, 4, 3), np.uint8), ids, None, PALETTE, ["a", name]) for name in ("左边", "class 1")
    )
    assert (chinese == number).all()


def test_a_long_legend_wraps():
    count = 60
    labels = np.arange(100 * 320).reshape(100, 320) % count
    names = [f"a class called {i}" for i in range(count)]
    picture = draw_comparison(np.zeros((100, 320, 3), np.uint8), labels, None, [[i, 0, 9] for i in range(count)], names)

    assert picture.shape[0] > 100 + 10 * 26
    legend = {tuple(colour) for colour in np.unique(picture[140:].reshape(-1, 3), axis=0).tolist()}
    assert legend >= {(i, 0, 9) for i in range(count)}


def test_a_mask_file_holds_ids_and_shows_colours(tmp_path):
    labels = np.array([[0, 1, 2], [2, 255, 0]], np.int64)
    path = tmp_path / "masks" / "a.png"
    save_mask(labels, path, PALETTE)

    with Image.open(path) as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), labels)
        assert np.asarray(mask.convert("RGB"))[0, 1].tolist() == [0, 200, 0]
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_mask_of_more_classes_than_a_palette_holds_is_16_bit_grey(tmp_path):
    labels = np.array([[0, 255, 256], [835, 999, 1]], np.int64)
    save_mask(labels, tmp_path / "a.png", [[0, 0, 0]] * 1000)
    with Image.open(tmp_path / "a.png") as mask:
        assert mask.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(mask), labels)
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16


def test_ids_that_fit_no_mask_file_are_our_own_fault(tmp_path):
    with pytest.raises(AssertionError, match="class id 256 does not fit a mask of 3 classes"):
        save_mask(np.array([[256]]), tmp_path / "a.png", PALETTE)
    with pytest.raises(AssertionError, match="negative class id -1"):
        save_mask(np.array([[-1]]), tmp_path / "a.png", PALETTE)


def test_a_picture_comes_back_as_it_was(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_picture(picture, tmp_path / "new" / "a.png")

    np.testing.assert_array_equal(load_rgb(tmp_path / "new" / "a.png"), picture)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jpg can't be read as an image"):
        load_rgb(tmp_path / "missing.jpg")


def test_an_image_whose_name_is_not_utf8_is_read_and_an_empty_one_named(tmp_path):
    path = tmp_path / os.fsdecode(b"\xe9.png")  # what ended the process in cv2.imread
    save_picture(np.full((2, 3, 3), 7, np.uint8), path)
    assert load_rgb(path).tolist() == np.full((2, 3, 3), 7).tolist()
    path.write_bytes(b"")
    with pytest.raises(DataError, match="can't be read as an image"):
        load_rgb(path)


def test_images_of_one_name_in_two_folders_have_pictures_of_their_own():
    names = ["seq1/0001.jpg", "seq2/0001.jpg", "frame.0001.png", "/data/seq1/0001.jpg"]
    assert list(map(name_picture, names)) == ["seq1_0001", "seq2_0001", "frame.0001", "data_seq1_0001"]
