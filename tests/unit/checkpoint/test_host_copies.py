from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_seg.checkpoint.contents import count_bytes, find_tensors
from ds_seg.checkpoint.host_copies import HostCopies


def make_content():
    """Views, shared memory, other dtypes, gradients and attributes, as they occur in optimizers."""
    base = torch.arange(12.0)
    flat = base.clone().requires_grad_()
    flat.grad = torch.ones(12)
    flat.ds_id = "0_3"
    name = "shared"
    return {
        "views": [base[2:6], base.view(3, 4).t(), base],
        "flat": flat,
        "again": {name: flat, "list": [name, name]},
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "empty": [torch.empty(0), torch.empty(0)],
        "step": torch.tensor(7.0),
        "plain": OrderedDict(shape=torch.Size((2, 3)), number=3, none=None),
    }


def write(content, path):
    with path.open("wb") as file:
        torch.save(content, file)
    return path.read_bytes()


def test_a_copy_is_stored_as_the_same_bytes(tmp_path):
    content = make_content()
    copied = HostCopies().copy({"a.pt": content})["a.pt"]
    assert write(copied, tmp_path / "copy.pt") == write(content, tmp_path / "own.pt")


def test_a_copy_does_not_move_with_the_original(tmp_path):
    content = make_content()
    before = write(content, tmp_path / "before.pt")
    copied = HostCopies().copy({"a.pt": content})["a.pt"]
    with torch.no_grad():
        for tensor in find_tensors(content):
            tensor += 1
    content["again"]["list"].append("more")
    content["plain"]["number"] = 4
    assert write(copied, tmp_path / "copy.pt") == before != write(content, tmp_path / "after.pt")


def test_the_same_memory_is_used_again(tmp_path):
    copies, content = HostCopies(), make_content()
    first = [tensor.data_ptr() for tensor in find_tensors(copies.copy({"a.pt": content})["a.pt"])]
    content["step"] += 1
    second = copies.copy({"a.pt": content})["a.pt"]
    assert [tensor.data_ptr() for tensor in find_tensors(second)] == first
    assert second["step"] == 8
    content["bf16"] = torch.zeros(5, dtype=torch.bfloat16)
    assert write(copies.copy({"a.pt": content})["a.pt"], tmp_path / "a") == write(content, tmp_path / "b")


def test_memory_that_a_save_has_no_use_for_is_given_back():
    copies, content = HostCopies(), make_content()
    first = copies.copy({"a.pt": content, "b.pt": make_content()})
    kept = {tensor.untyped_storage().data_ptr() for tensor in find_tensors(first["a.pt"])}
    copies.copy({"a.pt": content})
    assert {storage.data_ptr() for storage in copies._memory.values()} == kept


def test_text_and_links_stay_as_they_are():
    files = {"state.json": "{}", "backbone.safetensors": Path("a/b")}
    assert HostCopies().copy(files) == files


def test_bytes_count_each_memory_once_and_whole():
    content = make_content()
    assert len(find_tensors(content)) == 9
    assert count_bytes(content) == 48 + 48 + 6 + 8 + 4
    assert count_bytes("four") == 4 and count_bytes(Path("a/b")) == 0


@pytest.mark.parametrize("value", [torch.arange(6).view(2, 3), torch.ones(4, dtype=torch.bool)[1:3]])
def test_safetensors_of_a_copy(tmp_path, value):
    from safetensors.torch import load_file, save_file

    copied = HostCopies().copy({"a.safetensors": {"a": value.contiguous()}})
    save_file(copied["a.safetensors"], tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["a"], value)
