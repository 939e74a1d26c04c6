"""Full-parameter fine-tuning of InternViT-6B for semantic segmentation under DeepSpeed ZeRO-3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_seg.inference import Segmentation, SegmentationModel, load_model

__version__ = "0.1.0"
__all__ = ["Segmentation", "SegmentationModel", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for: `ds-seg --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_seg import inference

    return getattr(inference, name)
