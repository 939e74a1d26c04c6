"""Generated scenes in the folders and under the names that the datasets of ds_configs expect."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ADE_SPLITS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps its files; `{split}` stands for train or val."""

    images: str
    masks: str
    suffixes: tuple[str, str]
    lists: dict[str, str]
    """Split file -> train or val."""


COCO = Layout("images/{split}2017", "annotations/{split}2017", (".jpg", "_labelTrainIds.png"), {})
CITYSCAPES = Layout(
    "leftImg8bit/{split}/town", "gtFine/{split}/town", ("_leftImg8bit.png", "_gtFine_labelTrainIds.png"), {}
)
CONTEXT = Layout(
    "JPEGImages",
    "SegmentationClassContext",
    (".jpg", ".png"),
    {f"ImageSets/SegmentationContext/{split}.txt": split for split in ("train", "val")},
)
VOC = Layout(
    "JPEGImages",
    "SegmentationClass",
    (".jpg", ".png"),
    {f"ImageSets/Segmentation/{split}.txt": split for split in ("train", "val")},
)
ROOTS = {
    "COCO_STUFF_ROOT": COCO,
    "CITYSCAPES_ROOT": CITYSCAPES,
    "PASCAL_CONTEXT_ROOT": CONTEXT,
    "VOC_ROOT": VOC,
}
"""Environment variable of a dataset -> its layout."""


def write_layouts(scenes: Path, out: Path, *, train_images: int, val_images: int) -> dict[str, str]:
    """Copy a few scenes (in ADE20K's layout) into each layout.

    Returns:
        Environment variables that name the folders, ADE20K's and the demo's too.
    """
    counts = {"train": train_images, "val": val_images}
    names = {
        split: sorted(path.stem for path in (scenes / "images" / folder).glob("*.jpg"))[: counts[split]]
        for split, folder in ADE_SPLITS.items()
    }
    ade = Layout("images/{split}", "annotations/{split}", (".jpg", ".png"), {})
    for root, layout in {"ADE20K_ROOT": ade, **ROOTS}.items():
        _write(scenes, out / root, layout, names)
    voc = out / "VOC_ROOT"
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationClassAug")
    shutil.copy(voc / "ImageSets/Segmentation/train.txt", voc / "ImageSets/Segmentation/aug.txt")
    return {root: str(out / root) for root in ("ADE20K_ROOT", *ROOTS)} | {"DS_SEG_DEMO_ROOT": str(scenes)}


def _write(scenes: Path, out: Path, layout: Layout, names: dict[str, list[str]]) -> None:
    is_ade = layout.images == "images/{split}"
    for split, stems in names.items():
        folder = ADE_SPLITS[split]
        kinds = (("images", ".jpg", layout.images), ("annotations", ".png", layout.masks))
        for (kind, suffix, target), new_suffix in zip(kinds, layout.suffixes, strict=True):
            destination = out / target.format(split=folder if is_ade else split)
            destination.mkdir(parents=True, exist_ok=True)
            for stem in stems:
                shutil.copy(scenes / kind / folder / f"{stem}{suffix}", destination / f"{stem}{new_suffix}")
    for path, split in layout.lists.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("\n".join(names[split]) + "\n")
