"""docs/switching.md followed word for word, in a folder like InternVL's with a small network."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from command_line import environment
from internvl_folder import NAMES, write_internvl_folder

PAGE = Path(__file__).parents[2] / "docs" / "switching.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory, scenes):
    """A folder in which every block of the page was run in its order, and what all of them printed."""
    folder = tmp_path_factory.mktemp("segmentation")
    write_internvl_folder(folder, scenes)
    printed = ""
    for code in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=folder, env=environment(WANDB_MODE="disabled"), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        printed += done.stdout + done.stderr
    return folder, printed


def test_the_page_leads_from_their_config_to_their_checkpoint(followed):
    folder, _ = followed
    summary = json.loads((folder / "work_dirs/upernet/summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 2 and summary["zero_stage"] == 3
    assert summary["head"]["type"] == "UPerHead" and summary["backbone"]["dtype"] == "bfloat16"
    assert len(list((folder / "predictions/masks").glob("*.png"))) == 6
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["images"] == 6 and scores["checkpoint"] == "checkpoints/upernet.pth"


def test_what_means_nothing_is_said_once(followed):
    _, printed = followed
    training = printed.partition("assumed, not measured")[2].partition("wrote ")[0]  # what comes after the plan
    for key in ("workflow", "deepspeed_config", "log_config.hooks[1]", "custom_hooks[0]", "cudnn_benchmark"):
        assert training.count(f"config key '{key}' has no effect: ") == 1, key


def test_the_page_names_configs_that_exist_there():
    assert f"full_tuning/{NAMES['full_tuning']}.py" in PAGE.read_text()
