from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ds_seg.errors import WeightsError
from ds_seg.models.weight_files import WeightFiles

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16()}


class Unsafe:
    """Something that a state dict should not hold."""


def check_holds_state(files):
    assert files.shapes == {"a.weight": (2, 3), "b": (4,)}
    for name, value in STATE.items():
        torch.testing.assert_close(files.read(name), value, rtol=0, atol=0)
        assert files.read(name).dtype == value.dtype


@pytest.mark.parametrize("nest", [[], ["module"], ["state_dict"], ["model"], ["model", "state_dict"]])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, nest, zipped):
    loaded = {**STATE, "epoch": 3}
    for key in nest:
        loaded = {key: loaded, "meta": {"version": "1"}}
    torch.save(loaded, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check_holds_state(WeightFiles(tmp_path / "w.pth"))


def test_safetensors_values_are_read_one_by_one(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    check_holds_state(WeightFiles(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards(tmp_path, name):
    for i, (key, value) in enumerate(STATE.items()):
        save_file({key: value}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {key: f"model-{i}.safetensors" for i, key in enumerate(STATE)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_holds_state(WeightFiles(tmp_path / name))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=r"names shards that are not beside it: \['model-1\.safetensors'\]\. Download"
    ):
        WeightFiles(tmp_path / name)


def test_a_folder_with_one_file(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    check_holds_state(WeightFiles(tmp_path))


def test_missing_and_foreign_paths(tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.pth does not exist\. Check the path"):
        WeightFiles(tmp_path / "absent.pth")
    with pytest.raises(
        WeightsError, match=r"holds none of model\.safetensors\.index\.json.*Name the weight file itself"
    ):
        WeightFiles(tmp_path)
    (tmp_path / "x.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="has no 'weight_map'"):
        WeightFiles(tmp_path / "x.index.json")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "old.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_truncated_files(tmp_path, name, keep):
    path = tmp_path / name
    big = {"w": torch.randn(64, 64)}
    if name == "w.safetensors":
        save_file(big, path)
    else:
        torch.save(big, path, _use_new_zipfile_serialization=name == "w.pth")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(WeightsError, match=rf"{name} can't be read \(.*damaged, cut short.*download or copy it again"):
        WeightFiles(path)


def test_other_objects_and_no_tensors(tmp_path):
    torch.save({"w": torch.ones(1), "x": Unsafe()}, tmp_path / "unsafe.pth")
    with pytest.raises(WeightsError, match=r"holds more than tensors.*save its state dict alone"):
        WeightFiles(tmp_path / "unsafe.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"list\.pth holds no tensors"):
        WeightFiles(tmp_path / "list.pth")
