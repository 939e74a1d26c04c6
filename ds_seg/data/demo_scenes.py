"""Generated outdoor scenes in ADE20K's folder layout, for the demo and for tests.

Every class may take the colours of every other class, and lighting differs from scene to scene, so it
is texture and shape that tell the classes apart: a network has to learn features to do well.

Shape legend: H, W are a scene's height and width in px; a trailing 3 is blue, green, red in 0..1.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from ds_seg.errors import DataError

STAMP_NAME = "demo_scenes.json"
_FORMAT_VERSION = 1
_OUTLINE_PX = 3
_SPLITS = ("training", "validation")

SKY, GRASS, WATER, ROAD, BUILDING, TREE = range(1, 7)

# Blue, green, red. Each class has favourites, and takes any of the others often enough to confuse.
_COLOURS_BGR = np.array(
    [
        (0.86, 0.66, 0.42),  # clear blue
        (0.72, 0.70, 0.68),  # grey
        (0.50, 0.64, 0.86),  # orange
        (0.30, 0.55, 0.36),  # green
        (0.36, 0.58, 0.64),  # straw
        (0.48, 0.42, 0.22),  # deep blue
        (0.30, 0.36, 0.48),  # brown
        (0.55, 0.66, 0.74),  # sand
    ],
    dtype=np.float32,
)
_FAVOURITES = {
    SKY: (0, 1, 2),
    GRASS: (3, 4),
    WATER: (0, 5),
    ROAD: (1, 6),
    BUILDING: (1, 2, 7),
    TREE: (3, 6),
}
_FAVOURITE_SHARE = 0.75


class _Scene:
    """A picture and its annotation, painted back to front."""

    def __init__(self, rng: np.random.Generator, height_px: int, width_px: int) -> None:
        self.rng = rng
        self.height_px, self.width_px = height_px, width_px
        self.image_HW3 = np.zeros((height_px, width_px, 3), np.float32)
        self.label_HW = np.zeros((height_px, width_px), np.uint8)
        self.outline_HW = np.zeros((height_px, width_px), np.uint8)

    def noise(self, cell_y_px: float, cell_x_px: float) -> np.ndarray:
        """Smooth noise of unit variance over the whole scene, with grains of the given size."""
        rows = math.ceil(self.height_px / cell_y_px) + 1
        columns = math.ceil(self.width_px / cell_x_px) + 1
        grid = self.rng.standard_normal((rows, columns), dtype=np.float32)
        return cv2.resize(grid, (self.width_px, self.height_px), interpolation=cv2.INTER_CUBIC)

    def skyline(self, level: float, roughness: float) -> np.ndarray:
        """Mask of all that lies under a wavy line at `level` (a fraction of the height)."""
        knots = self.rng.standard_normal((1, self.rng.integers(3, 6)), dtype=np.float32)
        line_1W = cv2.resize(knots, (self.width_px, 1), interpolation=cv2.INTER_CUBIC)
        rows_H1 = np.arange(self.height_px, dtype=np.float32)[:, None] / self.height_px
        return rows_H1 > level + roughness * line_1W

    def polygon(self, points_xy: list[tuple[float, float]]) -> np.ndarray:
        """Mask of a polygon given in fractions of the width and height."""
        size_px = (self.width_px, self.height_px)
        corners = np.array([[x * size_px[0], y * size_px[1]] for x, y in points_xy]).round().astype(np.int32)
        return cv2.fillPoly(np.zeros((self.height_px, self.width_px), np.uint8), [corners], 1).astype(bool)

    def paint(self, mask_HW: np.ndarray, class_id: int, texture_HW: np.ndarray) -> None:
        """Cover `mask_HW` with a colour of the class times 1 + `texture_HW`."""
        favourites = _FAVOURITES[class_id]
        choices = favourites if self.rng.random() < _FAVOURITE_SHARE else range(len(_COLOURS_BGR))
        colour_3 = _COLOURS_BGR[self.rng.choice(choices)] * self.rng.uniform(0.85, 1.15, 3).astype(np.float32)
        self.image_HW3[mask_HW] = (colour_3 * (1.0 + texture_HW[..., None]))[mask_HW]
        self.label_HW[mask_HW] = class_id
        mask_u8 = mask_HW.astype(np.uint8)
        self.outline_HW[mask_HW] = 0
        edge_HW = cv2.morphologyEx(mask_u8, cv2.MORPH_GRADIENT, np.ones((_OUTLINE_PX, _OUTLINE_PX), np.uint8))
        self.outline_HW[edge_HW > 0] = 1

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The lit picture (uint8, BGR) and the annotation with its ignored outlines and frame (uint8)."""
        light_HW = self.rng.uniform(0.65, 1.1) + 0.12 * self.noise(self.height_px, self.width_px)
        tint_3 = self.rng.uniform(0.88, 1.12, 3).astype(np.float32)
        grain_HW3 = 0.02 * self.rng.standard_normal(self.image_HW3.shape, dtype=np.float32)
        lit_HW3 = self.image_HW3 * light_HW[..., None] * tint_3 + grain_HW3
        label_HW = np.where(self.outline_HW, 0, self.label_HW).astype(np.uint8)
        frame_px = int(self.rng.integers(0, 5))
        inner_HW = np.zeros_like(label_HW)
        inner_HW[frame_px : self.height_px - frame_px, frame_px : self.width_px - frame_px] = 1
        return (lit_HW3.clip(0, 1) * 255).astype(np.uint8), label_HW * inner_HW


def _sky_texture(scene: _Scene) -> np.ndarray:
    rows_H1 = np.linspace(-1, 1, scene.height_px, dtype=np.float32)[:, None]
    return scene.rng.uniform(-0.1, 0.25) * rows_H1 + scene.rng.uniform(0.02, 0.08) * scene.noise(26, 52)


def _grass_texture(scene: _Scene) -> np.ndarray:
    return scene.rng.uniform(0.18, 0.28) * scene.noise(12, 3) + 0.06 * scene.noise(30, 30)


def _water_texture(scene: _Scene) -> np.ndarray:
    return scene.rng.uniform(0.18, 0.28) * scene.noise(4, scene.rng.uniform(20, 30)) + 0.05 * scene.noise(24, 60)


def _road_texture(scene: _Scene) -> np.ndarray:
    pebbles_HW = (scene.noise(2.5, 2.5) > 1.1).astype(np.float32)
    return -scene.rng.uniform(0.35, 0.55) * pebbles_HW + 0.05 * scene.noise(18, 18)


def _tree_texture(scene: _Scene) -> np.ndarray:
    clumps_px = scene.rng.uniform(7, 10)
    return scene.rng.uniform(0.28, 0.38) * scene.noise(clumps_px, clumps_px) + 0.06 * scene.noise(2, 2)


def _building_texture(scene: _Scene) -> np.ndarray:
    period_y_px, period_x_px = scene.rng.uniform(12, 17), scene.rng.uniform(11, 15)
    rows_H1 = np.arange(scene.height_px, dtype=np.float32)[:, None] / period_y_px
    columns_1W = np.arange(scene.width_px, dtype=np.float32)[None] / period_x_px + scene.rng.random()
    windows_HW = ((rows_H1 % 1) < 0.6) & ((columns_1W % 1) < 0.55)
    contrast = scene.rng.uniform(0.4, 0.6) * scene.rng.choice((-1, 1), p=(0.8, 0.2))
    return contrast * windows_HW.astype(np.float32) + 0.04 * scene.noise(12, 12)


_GROUND_TEXTURES: dict[int, Callable[[_Scene], np.ndarray]] = {
    GRASS: _grass_texture,
    WATER: _water_texture,
    ROAD: _road_texture,
}


def _paint_ground(scene: _Scene, horizon: float) -> None:
    grounds = [int(ground) for ground in scene.rng.permutation(list(_GROUND_TEXTURES))]
    scene.paint(scene.skyline(horizon, 0.05), grounds[0], _GROUND_TEXTURES[grounds[0]](scene))
    near = scene.rng.uniform(horizon + 0.2, 0.8)
    scene.paint(scene.skyline(near, 0.05), grounds[1], _GROUND_TEXTURES[grounds[1]](scene))
    if scene.rng.random() < 0.6:
        far_x, near_x = scene.rng.uniform(0.1, 0.9), scene.rng.uniform(0.0, 1.0)
        far_width, near_width = scene.rng.uniform(0.1, 0.2), scene.rng.uniform(0.4, 0.7)
        corners = [
            (far_x - far_width / 2, horizon + 0.08),
            (far_x + far_width / 2, horizon + 0.08),
            (near_x + near_width / 2, 1.0),
            (near_x - near_width / 2, 1.0),
        ]
        scene.paint(scene.polygon(corners), grounds[2], _GROUND_TEXTURES[grounds[2]](scene))


def _paint_building(scene: _Scene, horizon: float) -> None:
    rng = scene.rng
    left, width = rng.uniform(-0.05, 0.8), rng.uniform(0.2, 0.4)
    foot, top = horizon + rng.uniform(0.03, 0.15), horizon - rng.uniform(0.15, 0.4)
    corners = [(left, foot), (left, top), (left + width, top), (left + width, foot)]
    if rng.random() < 0.5:
        corners.insert(2, (left + width / 2, top - rng.uniform(0.05, 0.12)))
    scene.paint(scene.polygon(corners), BUILDING, _building_texture(scene))


def _paint_tree(scene: _Scene, horizon: float) -> None:
    rng = scene.rng
    x_px, foot_px = rng.uniform(0.05, 0.95) * scene.width_px, rng.uniform(horizon + 0.05, 0.85) * scene.height_px
    radius_px = rng.uniform(0.09, 0.19) * scene.width_px
    crown_HW = np.zeros((scene.height_px, scene.width_px), np.uint8)
    crown_y_px = foot_px - 1.3 * radius_px
    for _ in range(int(rng.integers(3, 6))):
        centre = (int(x_px + rng.normal(0, radius_px / 3)), int(crown_y_px + rng.normal(0, radius_px / 4)))
        axes = (int(radius_px * rng.uniform(0.6, 0.9)), int(radius_px * rng.uniform(0.6, 1.0)))
        cv2.ellipse(crown_HW, centre, axes, 0, 0, 360, 1, -1)
    trunk_px = max(3, int(radius_px / 5))
    cv2.rectangle(crown_HW, (int(x_px) - trunk_px, int(crown_y_px)), (int(x_px) + trunk_px, int(foot_px)), 1, -1)
    scene.paint(crown_HW.astype(bool), TREE, _tree_texture(scene))


def draw_scene(seed: int, split_index: int, scene_index: int, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene, a function of its arguments alone.

    Args:
        seed: Of the whole dataset.
        split_index: 0 for training, 1 for validation.
        scene_index: Within the split.
        size_px: Typical width; widths and heights vary around it.

    Returns:
        The picture (H, W, 3) in BGR and the annotation (H, W), both uint8; ids 1..6, 0 is ignored.
    """
    rng = np.random.default_rng((seed, split_index, scene_index))
    width_px, height_px = int(size_px * rng.uniform(0.85, 1.15)), int(size_px * rng.uniform(0.7, 0.95))
    scene = _Scene(rng, height_px, width_px)
    horizon = rng.uniform(0.32, 0.55)
    scene.paint(np.ones((height_px, width_px), bool), SKY, _sky_texture(scene))
    _paint_ground(scene, horizon)
    things = [_paint_building] * int(rng.integers(1, 3)) + [_paint_tree] * int(rng.integers(1, 4))
    for index in rng.permutation(len(things)):
        things[index](scene, horizon)
    return scene.finish()


def write_demo_dataset(
    root: Path,
    *,
    train_images: int = 240,
    val_images: int = 60,
    size_px: int = 196,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the generated dataset under `root`, or leave it if it is there with the same parameters.

    The folder appears complete or not at all: it is written beside `root` and then renamed. One process
    calls this at a time.

    Args:
        root: Folder to make; its parent is made too.
        train_images: Scenes in images/training and annotations/training.
        val_images: Scenes in images/validation and annotations/validation.
        size_px: Typical width of a scene.
        seed: The files are a function of it and of the other parameters.
        workers: Threads that draw.

    Raises:
        DataError: `root` holds something that this function did not write, or can't be written.
    """
    stamp = {
        "version": _FORMAT_VERSION,
        "train_images": train_images,
        "val_images": val_images,
        "size_px": size_px,
        "seed": seed,
    }
    if _read_stamp(root) == stamp:
        return
    if root.exists() and _read_stamp(root) is None and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(
            f"the demo dataset can't be written to {root}: something is there that is not a demo dataset "
            f"(it has no {STAMP_NAME}). Name an empty or a new folder."
        )
    try:
        _replace_folder(root, stamp, workers)
    except OSError as error:
        raise DataError(f"the demo dataset can't be written to {root}: {error}. Name another folder.") from error


def _replace_folder(root: Path, stamp: dict[str, int], workers: int) -> None:
    partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for kind in ("images", "annotations"):
        for split in _SPLITS:
            (partial / kind / split).mkdir(parents=True)
    jobs = [(0, index) for index in range(stamp["train_images"])]
    jobs += [(1, index) for index in range(stamp["val_images"])]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _write_scene(partial, stamp["seed"], job[0], job[1], stamp["size_px"]), jobs))
    (partial / STAMP_NAME).write_text(json.dumps(stamp))
    if root.exists():
        shutil.rmtree(root)
    partial.rename(root)


def _read_stamp(root: Path) -> dict[str, int] | None:
    path = root / STAMP_NAME
    return json.loads(path.read_text()) if path.is_file() else None


def _write_scene(root: Path, seed: int, split_index: int, scene_index: int, size_px: int) -> None:
    image_HW3, label_HW = draw_scene(seed, split_index, scene_index, size_px)
    split, name = _SPLITS[split_index], f"scene_{scene_index:05d}"
    _, jpeg = cv2.imencode(".jpg", image_HW3, [cv2.IMWRITE_JPEG_QUALITY, 92])
    _, png = cv2.imencode(".png", label_HW)
    (root / "images" / split / f"{name}.jpg").write_bytes(jpeg.tobytes())
    (root / "annotations" / split / f"{name}.png").write_bytes(png.tobytes())
