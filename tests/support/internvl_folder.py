"""A folder like InternVL's `segmentation/`, with configs in its dialect (tests/configs_dialect), at tiny width."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ds_seg.models import InternViT

DIALECT = Path(__file__).parents[1] / "configs_dialect"
NAMES = {
    "linear_probing": "linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen",
    "head_tuning": "upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen",
    "full_tuning": "upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5",
    "few_shot": "linear_intern_vit_6b_504_20k_ade20k_bs16_lr4e-5_1of4",
}


def write_internvl_folder(folder: Path, scenes: Path) -> dict[str, Path]:
    """Write configs, data and weights under the names that they have there.

    Returns:
        The config of each kind, relative to the folder.
    """
    shutil.copytree(DIALECT / "_base_", folder / "configs/_base_")
    shutil.copytree(DIALECT / "zero_configs", folder / "zero_configs")
    configs = {}
    for kind, name in NAMES.items():
        (source,) = (DIALECT / kind).glob("*.py")
        configs[kind] = Path("configs/intern_vit_6b", kind, f"{name}.py")
        (folder / configs[kind]).parent.mkdir(parents=True)
        (folder / configs[kind]).write_text(source.read_text().replace("../_base_", "../../_base_"))
    (folder / "data/ade").mkdir(parents=True)
    (folder / "data/ade/ADEChallengeData2016").symlink_to(scenes)
    (folder / "pretrained").mkdir()
    backbone = InternViT(embed_dim=32, depth=4, num_heads=2, img_size=56, out_indices=[3])
    torch.save({"module": backbone.state_dict()}, folder / "pretrained/tiny.pth")
    return configs
