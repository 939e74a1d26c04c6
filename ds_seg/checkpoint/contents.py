"""What a checkpoint consists of: the files of this rank, as references to what the engines hold now."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero import GatheredParameters

from ds_seg import distributed
from ds_seg.checkpoint.averages import averages_file
from ds_seg.checkpoint.store import BACKBONE_TAG, FROZEN_BACKBONE_FILE, HEADS_FILE, list_checkpoints
from ds_seg.checkpoint.training_state import STATE_FILE, TrainingState, describe_state
from ds_seg.checkpoint.write import FileContent
from ds_seg.config import RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines


def collect_files(
    engines: Engines, run: RunConfig, state: TrainingState, ema: WeightAverages | None, folder: Path
) -> dict[str, FileContent]:
    """The files that this rank contributes; a collective over all ranks.

    Args:
        engines: what is to be saved.
        run: the run.
        state: where the run stands.
        ema: averages of the weights; None where there are none.
        folder: of the checkpoint. DeepSpeed puts scripts there, and the state that it keeps on disks of its own.

    Returns:
        Path in the folder -> content; tensors are those of the engines, so the next step changes them.
    """
    if engines.trainable_backbone:
        files = _collect_backbone(engines, folder)
    else:
        files = _collect_frozen_backbone(engines, list_checkpoints(run.work_dir))
    if ema is not None:
        files[averages_file()] = ema.backbone
    if distributed.is_main():
        averages = {"averages": ema.heads} if ema is not None else {}
        parts = {"heads": engines.heads.state_dict(), "optimizer": engines.head_optimizer.state_dict()}
        files[HEADS_FILE] = parts | averages
        files[STATE_FILE] = describe_state(state, run, engines, averaged=ema is not None)
    return files


def find_tensors(content: FileContent) -> list[torch.Tensor]:
    """Every tensor in the content of a file, however deep it lies, each once."""
    if not isinstance(content, Mapping):
        return []
    finder = _TensorFinder()
    finder.dump(content)
    return list(finder.found.values())


def find_storages(content: FileContent) -> list[torch.UntypedStorage]:
    """The memory that the tensors in the content of a file lie in: each storage once, and whole."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in find_tensors(content)}
    return list(storages.values())


def count_bytes(content: FileContent) -> int:
    """Bytes that the content of a file takes on the disk."""
    text = len(content.encode()) if isinstance(content, str) else 0
    return text + sum(storage.nbytes() for storage in find_storages(content))


class _Capture(TorchCheckpointEngine):
    """Keeps what DeepSpeed gives it to write.

    DeepSpeed's own writers in the background do not run on CPUs (0.19.8: `fast`, `decoupled`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.files: dict[str, FileContent] = {}

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        self.files[str(Path(path).relative_to(self.folder))] = state_dict


def _collect_backbone(engines: Engines, folder: Path) -> dict[str, FileContent]:
    engine = engines.backbone
    capture, own = _Capture(folder), engine.checkpoint_engine
    engine.checkpoint_engine = capture
    try:
        engine.save_checkpoint(str(folder), tag=BACKBONE_TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = own
    return capture.files


def _collect_frozen_backbone(engines: Engines, earlier: list[Path]) -> dict[str, FileContent]:
    """A backbone that never moves is written once and linked from then on."""
    source = earlier[-1] / FROZEN_BACKBONE_FILE if earlier else None
    if distributed.broadcast_object(source is not None and source.is_file()):
        return {FROZEN_BACKBONE_FILE: source} if distributed.is_main() and source else {}
    tensors = {}
    for name, parameter in engines.backbone.module.named_parameters():
        with GatheredParameters([parameter]):
            if distributed.is_main():
                tensors[name] = parameter.detach().cpu().clone()
    return {FROZEN_BACKBONE_FILE: tensors} if distributed.is_main() else {}


class _TensorFinder(pickle.Pickler):
    """Walks through an object as torch.save does and keeps the tensors that it meets."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
        self.found: dict[int, torch.Tensor] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.found[id(value)] = value
        return id(value)


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)
