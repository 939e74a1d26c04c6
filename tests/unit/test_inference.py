"""The Python API on small models with random weights; tests/e2e/test_export.py compares it with `ds-seg predict`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ds_seg
from ds_seg import distributed, load_model
from ds_seg.errors import DataError, UserError, WeightsError
from tiny_export import CLASSES, HEAD, PALETTE, build, describe, export

SIZES = [(30, 41), (60, 20), (8, 8)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export(path, describe("one_auxiliary_head"))
    return path


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, device="cpu")


def make_image(height=30, width=41, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_model_knows_its_classes_and_what_it_computes_in(model):
    assert model.classes == CLASSES and model.palette == PALETTE
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert not model.backbone.training and not model.heads.training
    assert len(model.heads.auxiliary_heads) == 0


def test_an_image_gets_labels_and_probabilities_at_its_own_size(model):
    found = model(make_image(), probabilities=True)
    assert found.labels_HW.shape == (30, 41) and found.labels_HW.dtype == np.uint8
    assert found.probabilities_KHW.shape == (3, 30, 41) and found.probabilities_KHW.dtype == np.float32
    np.testing.assert_array_equal(found.probabilities_KHW.argmax(0), found.labels_HW)
    np.testing.assert_allclose(found.probabilities_KHW.sum(0), 1, atol=1e-6)
    assert len(np.unique(found.labels_HW)) > 1
    assert model(make_image()).probabilities_KHW is None


def test_a_batch_of_several_sizes_gives_what_single_images_give(model):
    images = [make_image(*size, seed=seed) for seed, size in enumerate(SIZES)]
    for image, one in zip(images, model(images), strict=True):
        np.testing.assert_array_equal(one.labels_HW, model(image).labels_HW)
    assert model([]) == []


def test_both_formats_are_the_same_model(path, model, tmp_path):
    export(tmp_path / "model.pth", describe("one_auxiliary_head"))
    other = load_model(tmp_path / "model.pth", device=torch.device("cpu"))
    assert (other.classes, other.palette) == (model.classes, model.palette)
    wanted, got = (one(make_image(), probabilities=True).probabilities_KHW for one in (model, other))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["upernet", "cascade", "like_dinov2"])
def test_other_backbones_and_heads(tmp_path, name):
    description = describe(name, mode="whole")
    export(tmp_path / "m.safetensors", description)
    model = load_model(tmp_path / "m.safetensors", device="cpu")
    backbone, heads = build(description)
    sample = model._pipeline(0, make_image(40, 48))
    with torch.no_grad():
        wanted_BKHW = heads.eval().predict(backbone.eval()(sample.views[0][0]), (40, 48)).softmax(1)
    found = model(make_image(40, 48), probabilities=True)
    np.testing.assert_array_equal(found.probabilities_KHW, wanted_BKHW[0].numpy())


def test_one_channel_is_the_probability_of_class_1(tmp_path):
    description = describe()
    description.model["decode_head"] = {
        **description.model["decode_head"],
        "num_classes": 2,
        "out_channels": 1,
        "threshold": 0.4,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    }
    export(tmp_path / "m.safetensors", description)
    found = load_model(tmp_path / "m.safetensors", device="cpu")(make_image(), probabilities=True)
    assert found.probabilities_KHW.shape == (1, 30, 41)
    np.testing.assert_array_equal(found.labels_HW, found.probabilities_KHW[0] > 0.4)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_another_dtype_than_the_one_trained_in(path, model, dtype):
    other = load_model(path, device="cpu", dtype=dtype)
    assert other.dtype == torch.bfloat16 and other.heads.decode_head.conv_seg.weight.dtype == torch.float32
    assert {p.dtype for p in other.backbone.parameters()} == {torch.bfloat16}
    agreement = (other(make_image()).labels_HW == model(make_image()).labels_HW).mean()
    assert agreement > 0.9  # measured: 0.99


def test_a_process_of_a_larger_job_works_by_itself(path, model, monkeypatch):
    wanted = model(make_image()).labels_HW
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    np.testing.assert_array_equal(load_model(path, device="cpu")(make_image()).labels_HW, wanted)
    assert (distributed.rank(), distributed.world_size()) == (1, 2)


def test_the_package_offers_what_it_names():
    assert {name for name in ds_seg.__all__ if not hasattr(ds_seg, name)} == set()
    with pytest.raises(AttributeError, match="module 'ds_seg' has no attribute 'load_weights'"):
        _ = ds_seg.load_weights


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("street.jpg", r"got str, want an RGB image as numpy array .*numpy\.asarray"),
        (torch.zeros(3, 4, 4), r"got Tensor, want"),
        (np.zeros((4, 4, 4), np.uint8), r"got shape \(4, 4, 4\), .*without alpha.*convert\('RGB'\)"),
        (np.zeros((4, 4), np.uint8), r"got shape \(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float32), r"got dtype float32, .*by \(255 \* image\)\.round\(\)\.astype\('uint8'\)"),
    ],
)
def test_what_is_no_image(model, image, message):
    with pytest.raises(DataError, match=rf"model\(images\), images\[1\]: {message}"):
        model([make_image(), image])


def test_a_batch_in_one_array(model):
    with pytest.raises(DataError, match=r"model\(image\): got shape \(2, 4, 4, 3\), .*several images as a list"):
        model(np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", r"device='gpu' is not a device\. Use 'cpu', 'cuda' or 'cuda:N'\."),
        ("cuda:99", r"device='cuda:99' can't be used: this process sees \d+ GPUs\. Use another one, or 'cpu'\."),
        ("meta", r"device='meta' can't be used"),
    ],
)
def test_a_device_that_is_not_there(path, device, message):
    with pytest.raises(UserError, match=message):
        load_model(path, device=device)


@pytest.mark.parametrize("dtype", ["float16", torch.float64, "half"])
def test_a_dtype_that_is_not_computed_in(path, dtype):
    with pytest.raises(UserError, match=r"dtype=.* can't be used: the backbone computes in float32 or bfloat16"):
        load_model(path, device="cpu", dtype=dtype)


@pytest.mark.parametrize("image", [Image.new("RGB", (8, 8)), "street.jpg", torch.zeros(3, 8, 8), None])
def test_what_is_no_array_and_no_list_is_told_what_to_pass(model, image):
    wanted = r"model\(image\): got \w+, want an RGB image .* numpy\.asarray\(image\.convert\('RGB'\)\)"
    with pytest.raises(DataError, match=wanted):
        model(image)


def test_files_that_are_no_exports(tmp_path):
    (tmp_path / "train.txt").write_text("street_1\nstreet_2\n")
    with pytest.raises(WeightsError, match=r"train\.txt can't be read"):
        load_model(tmp_path / "train.txt", device="cpu")
    with pytest.raises(WeightsError, match=r"none\.safetensors does not exist"):
        load_model(tmp_path / "none.safetensors", device="cpu")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"plain\.safetensors was not exported by ds-seg"):
        load_model(tmp_path / "plain.safetensors", device="cpu")


def test_an_export_that_lost_layers(tmp_path):
    description = describe("upernet")
    export(tmp_path / "m.safetensors", description)
    kept = {name: value for name, value in load_file(tmp_path / "m.safetensors").items() if not name.startswith("up")}
    save_file(kept, tmp_path / "cut.safetensors", metadata=description.to_header())
    with pytest.raises(WeightsError, match=r"cut\.safetensors lacks \d+ parameters of its own model \(up1"):
        load_model(tmp_path / "cut.safetensors", device="cpu")


@pytest.mark.parametrize(
    "head", [{**HEAD, "type": "HeadOfMine"}, {**HEAD, "loss_decode": [{"type": "HeadOfMine"}, {"type": "DiceLoss"}]}]
)
def test_a_head_of_ones_own_must_be_imported_first(tmp_path, head):
    description = describe("linear")
    description = replace(description, model={**description.model, "decode_head": head})
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", metadata=description.to_header())
    wanted = r"has HeadOfMine, which .* Import the module of yours that registers it before you call load_model"
    with pytest.raises(UserError, match=wanted):
        load_model(tmp_path / "m.safetensors", device="cpu")
