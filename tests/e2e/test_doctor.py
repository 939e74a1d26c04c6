"""`ds-seg doctor`, and docs/own-data.md followed word for word on generated images and a small network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import environment
from ds_seg.config import CONFIGS_ROOT, read_config_file
from ds_seg.models import InternViT

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
COLOURS = [(0, 0, 0), (196, 84, 62), (140, 140, 140)]
SMALL = {
    "models/internvit6b_224.py": {
        "embed_dim=3200": "embed_dim=32", "depth=48": "depth=2", "num_heads=25": "num_heads=2",
        "in_channels=3200": "in_channels=32", " channels=3200": " channels=32", "out_indices=[47]": "out_indices=[1]",
        "504": "112", "322": "84",
    },
    "datasets/folders.py": {"504": "112", "2016": "448", "workers_per_gpu=4": "workers_per_gpu=1"},
    "schedules/adamw_80k.py": {"global_batch = 16": "global_batch = 2"},
}  # fmt: skip
"""What is too large for a CPU in the shipped configs, and what the tests put in its place."""


def blocks_of(page):
    """(language, title, code) of each fenced block."""
    return re.findall(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def write_roofs(root, count=10):
    """Pictures and their masks in colour."""
    rng = np.random.default_rng(0)
    for kind in ("images", "colours"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        ids = np.kron(rng.integers(0, 3, (4, 5)), np.ones((20, 20), int))
        colours = np.array(COLOURS, np.uint8)[ids]
        Image.fromarray(colours).save(root / "colours" / f"roof_{index:04}.png")
        Image.fromarray(colours // 2 + rng.integers(0, 99, colours.shape, np.uint8)).save(
            root / "images" / f"roof_{index:04}.jpg"
        )


def shrink_network(folder):
    """The shipped configs with SMALL values, and weights for the small network."""
    shutil.copytree(CONFIGS_ROOT, folder / "ds_configs")
    for name, changes in SMALL.items():
        path = folder / "ds_configs" / name
        text = path.read_text()
        for large, small in changes.items():
            assert large in text, f"{name} has no {large}"
            text = text.replace(large, small)
        path.write_text(text)
    arguments = dict(read_config_file(folder / "ds_configs/runs/own_data.py", {}).model.backbone)
    del arguments["type"]
    backbone = InternViT(**arguments)
    (folder / "pretrained").mkdir()
    torch.save(backbone.state_dict(), folder / "pretrained/intern_vit_6b_224px.pth")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder in which every block of the page was run in its order, and what each printed."""
    folder = tmp_path_factory.mktemp("own_data")
    write_roofs(folder / "data/roofs")
    shrink_network(folder)
    printed = []
    for language, title, code in blocks_of(PAGE.read_text()):
        if title:
            (folder / title).write_text(code)
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=folder, env=environment(WANDB_MODE="disabled"), capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return folder, printed


def test_the_page_leads_from_files_to_predictions(followed):
    folder, printed = followed
    report = json.loads((folder / "roofs.json").read_text())
    assert report["ok"] and report["splits"]["data.train"]["images"] == 9
    assert report["splits"]["data.val"]["classes"]["roof"]["images"] == 1
    assert any("no fault found" in text for text in printed)
    summary = json.loads((folder / "work_dirs/roofs_trial/summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 2
    assert len(list((folder / "roofs_predicted/masks").glob("*.png"))) == 10


def test_the_config_of_the_page_is_the_shipped_one_and_short():
    """The page's config is own_data.py with other values, in fewer than 10 lines."""
    (code,) = (code for _, title, code in blocks_of(PAGE.read_text()) if title)
    lines = [line for line in code.splitlines() if line.strip()]
    shipped = (CONFIGS_ROOT / "runs/own_data.py").read_text().replace("data/mine", "data/roofs")
    assert lines == [line for line in shipped.splitlines() if not line.startswith("#")]
    assert len(lines) < 10


def test_faults_end_with_code_2_and_the_names_of_the_files(followed, tmp_path):
    shutil.copytree(followed[0], tmp_path / "copy", ignore=shutil.ignore_patterns("work_dirs"))
    folder = tmp_path / "copy"
    Image.open(folder / "data/roofs/colours/roof_0003.png").save(folder / "data/roofs/masks/roof_0003.png")
    (folder / "data/roofs/masks/roof_0005.png").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "ds_seg", "doctor", "ds_configs/runs/roofs.py", "--json", "found.json"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("ds-seg: ") == 1
    assert re.search(r"roof_0003\.png: 3 channels: \d colours in place of class ids", done.stderr)
    assert "roof_0005.png is not there" in done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert not found["ok"] and {fault["kind"] for fault in found["faults"]} == {"colours", "unpaired"}
