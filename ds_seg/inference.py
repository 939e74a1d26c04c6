"""The Python API for users of a trained model: load an exported file, call it on images.

Needs neither a config file nor DeepSpeed. Sizes, normalisation, windows and arithmetic are those of `ds-seg predict`.

Shape suffixes: H, W pixels; 3 RGB or the channels of a normalised image; K classes; B images or windows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint.description import ModelDescription, read_description
from ds_seg.checkpoint.export import DTYPES
from ds_seg.config.faults import list_fields
from ds_seg.config.head_fields import decode_head_fields
from ds_seg.data.images import ArrayPipeline
from ds_seg.errors import DataError, UserError, WeightsError
from ds_seg.evaluation.lockstep import InferenceSettings, predict_images
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.heads import SegmentationHeads, build_heads
from ds_seg.models.weight_files import WeightFiles
from ds_seg.models.weight_report import summarise_names
from ds_seg.models.weight_segmentor import load_segmentor_weights

from mmseg.models.builder import HEADS  # isort: skip


@dataclass(frozen=True)
class Segmentation:
    """What a model says of one image, at the image's own size.

    Attributes:
        labels_HW: Class ids: uint8, or int64 beyond 256 classes.
        probabilities_KHW: float32, the sum over K is 1; None where they were not asked for. A head with one channel
            has K = 1: the probability of class 1.
    """

    labels_HW: np.ndarray
    probabilities_KHW: np.ndarray | None


class SegmentationModel:
    """A trained model, ready to segment images. Made by `load_model`.

    Attributes:
        classes: Names, in the order of the class ids.
        palette: RGB colour of each class, 0..255.
        device: Where it computes.
        dtype: What its backbone computes in; the head computes in float32.
        backbone: The InternViT.
        heads: The decode head.
    """

    def __init__(
        self, description: ModelDescription, backbone: nn.Module, heads: SegmentationHeads, device: torch.device
    ) -> None:
        self.classes, self.palette = description.classes, description.palette
        self.device, self.dtype = device, description.dtype
        self.backbone, self.heads = backbone.eval(), heads.eval()
        self._description = description
        self._pipeline = ArrayPipeline(description.pipeline)

    @overload
    def __call__(self, images: np.ndarray, *, probabilities: bool = False) -> Segmentation: ...

    @overload
    def __call__(self, images: Sequence[np.ndarray], *, probabilities: bool = False) -> list[Segmentation]: ...

    def __call__(
        self, images: np.ndarray | Sequence[np.ndarray], *, probabilities: bool = False
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or several of any sizes.

        Args:
            images: One RGB image, uint8, (H, W, 3), or a sequence of such images.
            probabilities: Whether the results hold the probability of every class too (4 K H W bytes an image).

        Returns:
            One result, or a list with one result an image, in order.

        Raises:
            DataError: an image is no such array.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str)
        batch: Sequence[np.ndarray] = images if several else [images]  # type: ignore[list-item,assignment]
        for index, image_HW3 in enumerate(batch):
            _validate_image(image_HW3, f"model(images), images[{index}]" if several else "model(image)")
        with distributed.alone():
            found = self._segment(batch, probabilities)
        return found if several else found[0]

    def _segment(self, images: Sequence[np.ndarray], probabilities: bool) -> list[Segmentation]:
        settings = InferenceSettings(
            test_cfg=self._description.model["test_cfg"],
            in_channels=self.backbone.in_chans,  # type: ignore[arg-type]
            out_channels=self.heads.out_channels,
            align_corners=self.heads.align_corners,
            window_batch=self._description.window_batch,
            device=self.device,
            patch_size=self.backbone.patch_size,  # type: ignore[arg-type]
            threshold=self.heads.threshold,
            keep_scores=probabilities,
        )
        samples = (self._pipeline(index, image_HW3) for index, image_HW3 in enumerate(images))
        predictions = predict_images(samples, self._encode_decode, settings)
        return [Segmentation(one.labels_HW, one.scores_KHW) for one in predictions]

    def _encode_decode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images_B3HW.to(self.device, self.dtype))
        return self.heads.predict(features, images_B3HW.shape[2:])


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> SegmentationModel:
    """Load what `ds-seg export` has written, in either format.

    Args:
        path: The file.
        device: `cpu`, `cuda` or `cuda:N`; by default a GPU where there is one.
        dtype: What the backbone computes in, float32 or bfloat16; by default what it was trained in.

    Returns:
        The model; call it on images.

    Raises:
        WeightsError: the file does not exist, is damaged, or is no export.
        UserError: there is no such device, the dtype is another one, or a head or loss is of a type that nothing
            imported has registered.
    """
    chosen = _resolve_device(device)
    files = WeightFiles(Path(path))
    description = read_description(path, files.meta)
    files.close()
    if dtype is not None:
        description = replace(description, dtype=_resolve_dtype(dtype))
    model = {key: value for key, value in description.model.items() if key != "auxiliary_head"}
    _validate_registered(path, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mmseg\b")  # about losses
        heads = build_heads(model).to(chosen)
    with torch.device("meta"):  # 6 billion initial values would take longer than the file
        backbone = build_backbone(model)
    backbone.to(description.dtype).to_empty(device=chosen)
    with distributed.alone():
        (report,), _ = load_segmentor_weights(
            backbone, heads, Path(path), trunk_path=None, needs_head=True, log=lambda _report: None
        )
    if report.missing:
        raise WeightsError(
            f"{path} lacks {len(report.missing)} parameters of its own model ({summarise_names(report.missing)}). "
            "Export the checkpoint again."
        )
    return SegmentationModel(description, backbone.requires_grad_(False), heads.requires_grad_(False), chosen)


def _validate_registered(path: str | os.PathLike[str], model: Mapping[str, Any]) -> None:
    heads = decode_head_fields(model)
    losses = [loss for field, head in heads for loss in list_fields(f"{field}.loss_decode", head.get("loss_decode"))]
    strange = [part["type"] for _, part in [*heads, *losses] if HEADS.get(part["type"]) is None]
    if strange:
        raise UserError(
            f"{path} has {' and '.join(dict.fromkeys(strange))}, which MMSegmentation does not know. Import the module "
            "of yours that registers it before you call load_model."
        )


def _resolve_device(device: str | torch.device | None) -> torch.device:
    available = torch.cuda.is_available()
    try:
        chosen = torch.device(device if device is not None else "cuda" if available else "cpu")
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not a device. Use 'cpu', 'cuda' or 'cuda:N'.") from error
    count = torch.cuda.device_count() if available else 0
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and (chosen.index or 0) >= count):
        raise UserError(
            f"device={str(chosen)!r} can't be used: this process sees {count} GPUs. Use another one, or 'cpu'."
        )
    return chosen


def _resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype={dtype!r} can't be used: the backbone computes in {' or '.join(DTYPES)}.")
    return found


def _validate_image(image_HW3: object, where: str) -> None:
    """Check that something is an RGB image in memory.

    Raises:
        DataError: it is not.
    """
    wanted = "want an RGB image as numpy array of dtype uint8 and shape (H, W, 3)"
    if not isinstance(image_HW3, np.ndarray):
        raise DataError(
            f"{where}: got {type(image_HW3).__name__}, {wanted}. "
            "Convert it: numpy.asarray(image.convert('RGB')) does for one of PIL."
        )
    shape = image_HW3.shape
    if image_HW3.ndim != 3 or shape[2] != 3 or 0 in shape:
        hint = "Give several images as a list. " if image_HW3.ndim == 4 else ""
        raise DataError(
            f"{where}: got shape {shape}, {wanted}. {hint}Colour channels come last, without alpha: "
            "PIL.Image.open(path).convert('RGB') gives such an image."
        )
    if image_HW3.dtype != np.uint8:
        raise DataError(
            f"{where}: got dtype {image_HW3.dtype}, {wanted}. Values 0..255 become it by image.astype('uint8'), "
            "values 0..1 by (255 * image).round().astype('uint8')."
        )
