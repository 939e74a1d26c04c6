import numpy as np
import pytest
import torch
from PIL import Image

from ds_seg.data.evaluation_samples import make_evaluation_sample
from ds_seg.data.images import ArrayPipeline, ImageFiles, open_images, validate_images
from ds_seg.errors import ConfigError
from tiny_export import CLASSES, PALETTE, PIPELINE


@pytest.mark.parametrize("to_float32", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_an_array_passes_as_the_file_does(tmp_path, to_float32, flip):
    image_HW3 = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    Image.fromarray(image_HW3).save(tmp_path / "a.png")
    pipeline = [{**PIPELINE[0], "to_float32": to_float32}, {**PIPELINE[1], "flip": flip}]
    files = ImageFiles([tmp_path / "a.png"], pipeline, CLASSES, PALETTE)
    wanted, got = make_evaluation_sample(3, files[0]), ArrayPipeline(pipeline)(3, image_HW3)
    assert got.index == 3 and len(got.views) == len(wanted.views) == 1 + flip
    for (got_13HW, got_meta), (wanted_13HW, wanted_meta) in zip(got.views, wanted.views, strict=True):
        assert torch.equal(got_13HW, wanted_13HW)
        for key in ("ori_shape", "img_shape", "pad_shape", "flip"):
            assert got_meta[key] == wanted_meta[key]


@pytest.mark.parametrize(("pipeline", "first"), [([], "'nothing'"), ([{"type": "Resize"}], "'Resize'")])
def test_a_pipeline_that_reads_no_file(pipeline, first):
    with pytest.raises(ConfigError, match=rf"begins with {first}, .*Begin data\.test\.pipeline with dict\(type='Load"):
        ArrayPipeline(pipeline)


@pytest.mark.parametrize(
    ("step", "fault"),
    [({"type": "FromMyLab"}, "FromMyLab is not in the pipeline registry"), ({"type": "Resize", "ratio": 1}, "ratio")],
)
def test_a_step_that_can_not_be_built(step, fault):
    with pytest.raises(ConfigError, match=rf"pipeline can't be built: .*{fault}.* Import the module that registers"):
        ArrayPipeline([PIPELINE[0], step])


def test_new_images_go_through_the_first_pipeline_of_a_list():
    first, second = (
        {"type": "CustomDataset", "pipeline": PIPELINE, "classes": names} for names in (CLASSES, ["other"])
    )
    for data in ({"val": [first, second]}, {"val": second, "test": [first]}):
        assert tuple(open_images(data, []).CLASSES) == CLASSES


def test_classes_may_be_listed_in_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert tuple(ImageFiles([], PIPELINE, str(tmp_path / "classes.txt"), None).CLASSES) == CLASSES


def test_files_of_any_size_may_be_predicted(tmp_path, monkeypatch):
    Image.new("RGB", (60, 44)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    section = {"type": "FoldersDataset", "pipeline": PIPELINE, "classes": CLASSES}
    validate_images(open_images({"test": section}, [tmp_path / "large.png"]))
