"""What every variant of the step benchmark trains: one run, one batch, one set of first weights.

Shape suffixes: B images, H W pixels, 3 colours, 1 label.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import ds_seg.openmmlab  # noqa: F401
from ds_seg import distributed
from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.config.files import CONFIGS_ROOT
from ds_seg.data.training_batches import MicroBatch
from ds_seg.errors import ConfigError

from mmcv import Config, ConfigDict  # isort: skip

_INITIAL_STD = 0.02
_RUN_CONFIG = """
_base_ = [{preset!r}]
data = dict(
    samples_per_gpu={batch},
    train=dict(type="CustomDataset", pipeline=[dict(type="RandomCrop", crop_size=({crop_px}, {crop_px}))]),
    val=dict(type="CustomDataset", pipeline=[]),
)
optimizer = dict(
    type="AdamW",
    lr=4e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
optimizer_config = dict(grad_clip=dict(max_norm=1.0))
runner = dict(type="IterBasedRunner", max_iters=80000)
"""


@dataclass(frozen=True)
class Workload:
    """One training step, described so that every process can rebuild it."""

    preset: str
    depth: int
    """Blocks of the backbone."""
    crop_px: int
    batch: int
    """Crops a process."""
    world_size: int
    device: str
    checkpointing: str = "none"
    compile: bool = False

    @classmethod
    def read(cls, folder: Path) -> Workload:
        """The workload that `write` left in a folder."""
        return cls(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """Leave the workload and its run config in a folder, for `read` and `build_run`."""
        folder.mkdir(exist_ok=True)
        (folder / "workload.json").write_text(json.dumps(asdict(self)), encoding="utf-8")
        text = _RUN_CONFIG.format(preset=str(preset_path(self.preset)), batch=self.batch, crop_px=self.crop_px)
        (folder / "benchmark.py").write_text(text, encoding="utf-8")

    def build_run(self, folder: Path) -> RunConfig:
        """The preset at this depth, with the recipe that all variants train by.

        Raises:
            ConfigError: no such preset, or a crop that its patch does not divide.
        """
        backbone = read_backbone(self.preset)
        if self.crop_px % backbone.patch_size:
            raise ConfigError(f"--crop {self.crop_px}: not a multiple of the {backbone.patch_size} px patch.")
        taps = scale_taps(backbone.out_indices, backbone.depth, self.depth)
        options = {"depth": self.depth, "out_indices": taps, "checkpointing": self.checkpointing}
        options = {f"model.backbone.{name}": value for name, value in options.items()}
        run_options = RunOptions(str(folder / "benchmark.py"), compile=self.compile, cfg_options=options)
        return build_run_config(run_options, self.world_size)

    def draw_batch(self, run: RunConfig, step: int) -> MicroBatch:
        """Random crops and labels of this rank, the same for every variant."""
        generator = torch.Generator().manual_seed(step * self.world_size + distributed.rank())
        images_B3HW = torch.randn(self.batch, 3, self.crop_px, self.crop_px, generator=generator)
        shape = (self.batch, 1, self.crop_px, self.crop_px)
        labels_B1HW = torch.randint(int(run.model.decode_head.num_classes), shape, generator=generator)
        first = (step * self.world_size + distributed.rank()) * self.batch
        return MicroBatch(images_B3HW, labels_B1HW, list(range(first, first + self.batch)), [{}] * self.batch)


def preset_path(preset: str) -> Path:
    """The file in ds_configs/models that a preset names.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    path = CONFIGS_ROOT / "models" / f"{preset}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.py")))
        raise ConfigError(f"--preset {preset}: {path} does not exist. Presets: {known}.")
    return path


def read_backbone(preset: str) -> ConfigDict:
    """The config of a preset's backbone."""
    return Config.fromfile(str(preset_path(preset))).model.backbone


def scale_taps(taps: Iterable[int], depth: int, new_depth: int) -> list[int]:
    """The tapped blocks at the same relative heights in a network of another depth."""
    return [max(round((tap + 1) * new_depth / depth) - 1, 0) for tap in taps]


def draw_matrix(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """First values of one parameter, FP32; they depend on its name alone, so all variants start equal."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device) * _INITIAL_STD


def draw_matrices(module: nn.Module, device: torch.device) -> None:
    """Give every matrix of a plain module its first values; vectors keep the constants of their constructor."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(draw_matrix(name, parameter.shape, device))
