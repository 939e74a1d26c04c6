"""Deterministic kernels on GPUs, for `ds-seg train --deterministic`; docs/determinism.md tells what they cost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ds_seg.errors import UserError

_CUBLAS_WORKSPACES = ":4096:8"
"""Fixed workspaces, as torch's notes on reproducibility want them: cuBLAS is not deterministic with its own."""
_NO_IMPLEMENTATION = "does not have a deterministic implementation"


def use_deterministic_algorithms() -> None:
    """Let torch use nothing but deterministic algorithms; call it before CUDA starts.

    Only torch's strict mode will do: with `warn_only` it keeps attention's nondeterministic backward pass
    (torch 2.13, `aten/src/ATen/native/transformers/cuda/attention_backward.cu`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACES)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and no result reads such memory
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def explained_operations() -> Iterator[None]:
    """Turn torch's refusal of an operation into the user's error.

    Raises:
        UserError: an operation in the block has no deterministic implementation.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_IMPLEMENTATION not in str(error):
            raise
        raise UserError(
            f"--deterministic: {str(error).split(_NO_IMPLEMENTATION)[0].strip()} {_NO_IMPLEMENTATION} in torch "
            f"{torch.__version__}. Use a head, loss or image size that does without it (docs/determinism.md lists "
            "which ones need what), or leave --deterministic out."
        ) from error
