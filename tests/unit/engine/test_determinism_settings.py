import subprocess
import sys

import pytest

from ds_seg.engine.determinism import explained_operations
from ds_seg.errors import UserError

PROGRAM = """
import os, torch
from ds_seg.engine.determinism import use_deterministic_algorithms
use_deterministic_algorithms()
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.cuda.is_initialized() and not torch.backends.cudnn.benchmark
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.empty(4).isnan().all().item())
"""


@pytest.mark.parametrize(("given", "used"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_what_is_set_before_cuda_starts(monkeypatch, given, used):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [used, "False"]


def test_a_refused_operation_is_the_users_error_with_the_remedy():
    text = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_"
    with (
        pytest.raises(
            UserError, match=r"--deterministic: adaptive_avg_pool2d_backward_cuda does not have .*leave --det"
        ),
        explained_operations(),
    ):
        raise RuntimeError(text)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), explained_operations():
        raise RuntimeError("out of memory")
