from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ds_seg.errors import WeightsError
from ds_seg.models.weight_files import TensorEntry, WeightFiles, is_weight_path

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16()}


class Unsafe:
    """Something that a state dict should not hold."""


def check_holds_state(files):
    assert {name: entry.shape for name, entry in files.entries.items()} == {"a.weight": (2, 3), "b": (4,)}
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


def test_pickled_shards_are_opened_one_at_a_time(tmp_path, monkeypatch):
    for i, (key, value) in enumerate(STATE.items()):
        torch.save({key: value}, tmp_path / f"pytorch_model-{i}.bin")
    index = {"weight_map": {key: f"pytorch_model-{i}.bin" for i, key in enumerate(STATE)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    files = WeightFiles(tmp_path)
    loads, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **options: loads.append((path.name, options)) or load(path, **options)
    )
    for name in ("a.weight", "a.weight", "b", "b", "a.weight"):
        files.read(name)
    assert [name for name, _ in loads] == [f"pytorch_model-{i}.bin" for i in (0, 1, 0)]
    assert all(options["weights_only"] and options["mmap"] for _, options in loads)
    files.close()
    assert files._opened is None
    assert files.entries["b"] == TensorEntry(tmp_path / "pytorch_model-1.bin", (4,), torch.bfloat16)


def test_an_index_of_another_version_is_refused(tmp_path):
    save_file(STATE, tmp_path / "1.safetensors")
    index = {"weight_map": dict.fromkeys([*STATE, "c", "d"], "1.safetensors")}
    (tmp_path / "w.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"names 2 tensors that its shards lack \(c, d\)\. .*download them together"):
        WeightFiles(tmp_path / "w.index.json")


def test_bytes_of_every_kind_of_number(tmp_path):
    kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.uint16)
    state = {str(kind): torch.ones(3).to(kind) for kind in kinds}
    save_file(state, tmp_path / "w.safetensors")
    entries = WeightFiles(tmp_path / "w.safetensors").entries
    assert [entries[name].bytes for name in state][:-1] == [3, 6, 12, 24, 3]
    assert [entries[name].dtype for name in state][:-1] == list(kinds)[:-1]
    assert not entries[str(torch.uint16)].dtype.is_floating_point


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scores_and_classes_beside_the_weights(tmp_path, monkeypatch, module):
    """MMCV's meta, as written under either name that numpy had for its own constructor."""
    for constructor in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):
        monkeypatch.setattr(constructor, "__module__", module, raising=False)
    meta = {"CLASSES": ("road", "sky"), "PALETTE": np.zeros((2, 3), np.uint8), "best_score": np.float64(0.5)}
    torch.save({"meta": meta, "state_dict": STATE}, tmp_path / "w.pth")
    assert module.encode() in (tmp_path / "w.pth").read_bytes()
    files = WeightFiles(tmp_path / "w.pth")
    check_holds_state(files)
    assert files.classes == ("road", "sky")
    save_file(STATE, tmp_path / "w.safetensors", metadata={"CLASSES": '["road", "sky"]'})
    assert WeightFiles(tmp_path / "w.safetensors").classes == ("road", "sky")


def test_what_counts_as_a_weight_file(tmp_path):
    assert not is_weight_path(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert is_weight_path(tmp_path)
    assert is_weight_path(tmp_path / "absent.pth")
    assert not is_weight_path(tmp_path / "absent")


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


@pytest.mark.parametrize("content", [b"street_1\nstreet_2\n", b"0\n", b"h\x00", b"\x80\x02}q", b"J1"])
def test_files_of_another_kind(tmp_path, content):
    """Torch's unpickler takes them for instructions, and raises whatever these lead to."""
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"train\.txt can't be read .* not a weight file"):
        WeightFiles(tmp_path / "train.txt")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pointer_to_weights_that_git_did_not_fetch(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightsError, match="is a Git LFS pointer, not the weights: run `git lfs pull`"):
        WeightFiles(tmp_path / name)


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
    with pytest.raises(WeightsError, match=r"unsafe\.pth holds a \S*Unsafe beside its tensors.*save its weights alone"):
        WeightFiles(tmp_path / "unsafe.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"list\.pth holds no tensors"):
        WeightFiles(tmp_path / "list.pth")
