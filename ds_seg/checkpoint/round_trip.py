"""Proof that an exported file is the model: its logits beside those of what it was exported from.

The backbone is made on torch's `meta` device and each block gets its weights for the moment in which it runs, so that
the comparison needs no more memory than the export.

Shape suffixes: B images, K classes, H W pixels, C channels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ds_seg.checkpoint.model_weights import ModelWeights
from ds_seg.errors import ExportError
from ds_seg.models.heads import SegmentationHeads

_PATCHES = 4
"""Side of the random image, in patches."""
_REMEDY = "The file was not kept. Export again; if it happens again, please report it with the config."
_TOLERANCE = 1e-5
"""Of the largest logit. The same weights in the same arithmetic differ by nothing; this leaves room for a library."""


@dataclass(frozen=True)
class RoundTrip:
    """What a comparison found.

    Attributes:
        difference: Largest difference between logits of the file and of the source.
        largest: The source's largest logit.
        side_px: Of the random image.
    """

    difference: float
    largest: float
    side_px: int

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"round trip: logits of the file and of its source differ by at most {self.difference:.3g} (the largest is "
            f"{self.largest:.4g}), on a random image of {self.side_px} x {self.side_px} px on the CPU"
        )


def compare_logits(
    backbone: nn.Module,
    heads: SegmentationHeads,
    source: ModelWeights,
    exported: ModelWeights,
    *,
    file_dtype: torch.dtype,
    dtype: torch.dtype,
) -> RoundTrip:
    """Compute logits of a small random image with both weights, on the CPU.

    Where the file rounds more than the run's own arithmetic does, the file must have exactly the logits of the source
    rounded in the same way.

    Args:
        backbone: an InternViT on the meta device.
        heads: on the CPU; they are left with the exported state.
        source: what was exported.
        exported: what the file holds.
        file_dtype: of the backbone in the file.
        dtype: what the run's backbone computes in.

    Raises:
        ExportError: tensors of the heads or logits differ.
    """
    wrong = [
        name
        for name, value in source.heads.items()
        if name not in exported.heads or not torch.equal(value, exported.heads[name])
    ]
    if wrong:
        raise ExportError(
            f"the exported file has other values than the checkpoint in {', '.join(wrong[:5])}. {_REMEDY}"
        )
    wanted_BKHW = reference_BKHW = _compute_logits(backbone, heads, source, dtype)
    if file_dtype.itemsize < dtype.itemsize:
        rounded = replace(source, read=lambda name: source.read(name).to(file_dtype))
        reference_BKHW = _compute_logits(backbone, heads, rounded, dtype)
    got_BKHW = _compute_logits(backbone, heads, exported, dtype)
    largest = wanted_BKHW.abs().max().item()
    off = (got_BKHW - reference_BKHW).abs().max().item()
    if not off <= _TOLERANCE * largest:
        raise ExportError(f"logits of the exported file are off by {off:.3g} of {largest:.3g}. {_REMEDY}")
    return RoundTrip((got_BKHW - wanted_BKHW).abs().max().item(), largest, got_BKHW.shape[-1])


@torch.no_grad()
def _compute_logits(backbone: nn.Module, heads: SegmentationHeads, weights: ModelWeights, dtype: torch.dtype) -> Tensor:
    side_px = _PATCHES * backbone.patch_size  # type: ignore[operator]
    shape = (1, backbone.in_chans, side_px, side_px)
    image_1CHW = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    heads.load_state_dict(weights.heads)
    backbone.to(dtype).eval()
    with _borrow_weights(backbone, weights.read):
        features = backbone(image_1CHW.to(dtype))
    return heads.eval().predict(features, image_1CHW.shape[2:])


@contextmanager
def _borrow_weights(backbone: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Give each part of a backbone on the meta device its weights while it runs."""
    own = dict(backbone.named_parameters(recurse=False))
    for name, parameter in own.items():
        setattr(backbone, name, nn.Parameter(read(name).to(parameter.dtype), requires_grad=False))
    hooks = []
    memory: dict[tuple[str, torch.Size], Tensor] = {}  # one block's, used again: malloc keeps what is freed

    def borrow(name: str, wanted: Tensor, value: Tensor) -> Tensor:
        if (name, wanted.shape) not in memory:
            memory[name, wanted.shape] = torch.empty(wanted.shape, dtype=wanted.dtype)
        return memory[name, wanted.shape].copy_(value)

    for prefix, part in _list_parts(backbone):

        def fill(part: nn.Module, _inputs: object, prefix: str = prefix) -> None:
            state = part.state_dict()
            values = {name: borrow(name, wanted, read(f"{prefix}.{name}")) for name, wanted in state.items()}
            part.load_state_dict(values, assign=True)

        def empty(part: nn.Module, _inputs: object, _output: object) -> None:
            part.to("meta")

        hooks += [part.register_forward_pre_hook(fill), part.register_forward_hook(empty)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in own.items():
            setattr(backbone, name, parameter)


def _list_parts(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, and what stands beside them."""
    for name, part in backbone.named_children():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(part))
        else:
            yield name, part
