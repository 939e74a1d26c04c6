"""What `--compile` needs of a machine; tests/distributed/test_compiled_blocks.py has what it does."""

import pytest
from torch import nn

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
