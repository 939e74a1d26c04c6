"""What `--compile` needs of a machine; tests/distributed/test_compiled_blocks.py has what it does."""

import sysconfig

import pytest
import torch
from torch import nn

from ds_seg import distributed
from ds_seg.errors import UserError
from ds_seg.models.compilation import compile_blocks


@pytest.mark.parametrize(("named", "missing"), [(None, r"g\+\+, clang\+\+, c\+\+"), ("no-such-one", "no-such-one")])
def test_a_machine_without_a_compiler_is_told_the_remedy(monkeypatch, tmp_path, named, missing):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    with pytest.raises(
        UserError, match=rf"needs a C\+\+ compiler, and none of {missing} is on.*train without --compile"
    ):
        compile_blocks(nn.Module())  # type: ignore[arg-type]


def test_on_gpus_triton_needs_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "g++").touch(mode=0o755)
    with pytest.raises(UserError, match=r"needs a C compiler, and none of gcc, clang is on .* name it in CC"):
        compile_blocks(nn.Module())  # type: ignore[arg-type]
    (tmp_path / "gcc").touch(mode=0o755)
    with pytest.raises(UserError, match=rf"{tmp_path}/Python\.h is not there\. .*train without --compile"):
        compile_blocks(nn.Module())  # type: ignore[arg-type]
