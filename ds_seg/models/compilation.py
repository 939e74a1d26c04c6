"""Transformer blocks through torch.compile, each by itself: they share one compilation, and ZeRO-3 keeps its hooks."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ds_seg import distributed
from ds_seg.errors import UserError
from ds_seg.models.checkpointing import run_block
from ds_seg.models.internvit import InternViT
from ds_seg.models.layers import Block


def compile_blocks(backbone: InternViT) -> None:
    """Let every block run compiled where gradients are wanted, and as it is where none are.

    An evaluation has windows of several shapes and batch sizes, each of which would be compiled anew. What `selective`
    keeps, the compiler has to choose itself: from outside, a compiled block has nothing inside that could be kept.

    Args:
        backbone: its blocks are ZeRO-3 leaf modules, whose parameters are whole while their `forward` runs.

    Raises:
        UserError: there is no C++ compiler, which the CPU's kernels and the launching of the GPU's need, or Triton,
            which makes the GPU's, lacks a C compiler or Python's headers.
    """
    _validate_compiler("C++", "CXX", ["g++", "clang++", "c++"])
    if distributed.device().type == "cuda":
        _validate_compiler("C", "CC", ["gcc", "clang"])
        _validate_headers()
    inside = "selective" if backbone.checkpointing == "selective" else "none"
    for block in backbone.blocks:
        block.forward = _compile_forward(block, inside)  # type: ignore[method-assign]
    if inside == "selective":
        backbone.checkpointing = "none"


def _validate_compiler(language: str, variable: str, usual: list[str]) -> None:
    compilers = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, compilers)):
        raise UserError(
            f"--compile: torch.compile needs a {language} compiler, and none of {', '.join(compilers)} is on the PATH. "
            f"Install one (apt install g++, or conda install gxx), name it in {variable}, or train without --compile."
        )


def _validate_headers() -> None:
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        raise UserError(
            f"--compile: on GPUs Triton compiles against Python's headers, and {header} is not there. Install them "
            "(apt install python3-dev, or another Python that has them), or train without --compile."
        )


def _compile_forward(block: Block, policy: str) -> Callable[..., Tensor]:
    """A block's forward pass, compiled where gradients are wanted.

    Args:
        block: the block.
        policy: what is kept inside the compiled function, one of `checkpointing.POLICIES`.
    """
    eager = block.forward
    compiled = torch.compile(partial(run_block, policy, eager), dynamic=False)

    def forward(x_BND: Tensor, branch_scale_2B: Tensor | None = None) -> Tensor:
        run = compiled if torch.is_grad_enabled() else eager
        return run(x_BND, branch_scale_2B)

    return forward
