"""An exported file is the checkpoint: for evaluate, predict, train --load-from, export itself, and from Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import environment

WORKER = Path(__file__).with_name("commands_worker.py")
DOCS = Path(__file__).resolve().parents[2] / "docs"
FORMATS = {"safetensors": "model.safetensors", "mmseg": "model.pth"}


def run_python(folder, scenes, *arguments):
    env = environment(DS_SEG_DEMO_ROOT=str(scenes), WANDB_MODE="disabled")
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory, scenes, tiny_config, trained):
    """A folder with both exports and all that was made from them, and what each command printed."""
    folder = tmp_path_factory.mktemp("out")
    images = scenes / "images" / "validation"
    tensors, torch_file = FORMATS.values()
    lines = [
        ["export", tiny_config, trained, "--format", "safetensors", "--out", tensors],
        ["export", tiny_config, trained, "--format", "mmseg", "--dtype", "bfloat16", "--out", torch_file],
        [
            "export",
            tiny_config,
            torch_file,
            "--format",
            "safetensors",
            "--dtype",
            "bfloat16",
            "--out",
            "again.safetensors",
        ],
        *(["evaluate", tiny_config, name, "--out", f"{kind}.json"] for kind, name in FORMATS.items()),
        ["predict", tiny_config, trained, images, "--out", "of_checkpoint"],
        ["predict", tiny_config, torch_file, images, "--out", "of_export"],
        ["train", tiny_config, "--load-from", tensors, "--work-dir", "run", "--cfg-options", "runner.max_iters=1"],
    ]
    (folder / "commands.json").write_text(json.dumps([list(map(str, line)) for line in lines]))
    printed = run_python(folder, scenes, WORKER, "commands.json")
    return folder, re.split(r"^== \d+$", printed, flags=re.MULTILINE)[1:]


def test_the_round_trip_is_told_and_exact(out):
    for printed in out[1][:3]:
        assert "logits of the file and of its source differ by at most 0 (the largest is 0." in printed
    assert "wrote model.safetensors: backbone float32, heads float32, 6 classes; " in out[1][0]
    assert "wrote model.pth: backbone bfloat16, heads float32, 6 classes; " in out[1][1]
    assert "set concat_input=False in model.decode_head" in out[1][1]


def test_a_checkpoint_is_exported_without_deepspeed(out):
    assert [printed.splitlines()[-1] for printed in out[1][:2]] == ["False", "False"]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_evaluates_to_the_scores_of_the_training(out, trained, kind):
    summary = json.loads((trained / "summary.json").read_text())
    scores = json.loads((out[0] / f"{kind}.json").read_text())
    assert scores["checkpoint"] == FORMATS[kind]
    assert scores["eval/mIoU"] == summary["mIoU"]
    assert {name: scores[f"eval/IoU/{name}"] for name in summary["IoU"]} == summary["IoU"]


def test_an_export_predicts_what_the_checkpoint_predicts(out):
    masks = sorted((out[0] / "of_checkpoint" / "masks").iterdir())
    assert len(masks) == 6
    for mask in masks:
        assert (out[0] / "of_export" / "masks" / mask.name).read_bytes() == mask.read_bytes()


def test_an_export_is_a_start(out):
    assert "naming        HuggingFace InternVisionModel" in out[1][-1]
    assert "left initial  none" in out[1][-1]
    assert json.loads((out[0] / "run" / "summary.json").read_text())["steps"] == 1


API = """
import json, sys
import numpy as np
from ds_seg import load_model
from ds_seg.evaluation.pictures import load_rgb
paths = json.load(open("paths.json"))
for name in ("model.safetensors", "model.pth", "again.safetensors"):
    model = load_model(name, device="cpu")
    results = model([load_rgb(path) for path in paths])
    np.savez(name + ".npz", **{str(i): one.labels_HW for i, one in enumerate(results)})
print(model.classes, sorted({name.partition(".")[0] for name in sys.modules} & {"deepspeed", "ds_configs"}))
"""


def test_python_gets_the_labels_of_predict(out, scenes):
    folder = out[0]
    images = sorted((scenes / "images" / "validation").iterdir())
    (folder / "paths.json").write_text(json.dumps(list(map(str, images))))
    (folder / "api.py").write_text(API)
    printed = run_python(folder, scenes, "api.py")
    assert printed.splitlines()[-1] == "('sky', 'grass', 'water', 'road', 'building', 'tree') []"
    for name in (*FORMATS.values(), "again.safetensors"):
        labels = np.load(folder / f"{name}.npz")
        for index, image in enumerate(images):
            mask = np.asarray(Image.open(folder / "of_checkpoint" / "masks" / f"{image.stem}.png"))
            np.testing.assert_array_equal(labels[str(index)], mask)


def test_the_documented_code_runs(out, scenes, tmp_path):
    (block,) = re.findall(r"```python\n(.+?)```", (DOCS / "python-api.md").read_text(), flags=re.DOTALL)
    (tmp_path / "exported.safetensors").symlink_to(out[0] / "model.safetensors")
    image = next((scenes / "images" / "validation").iterdir())
    (tmp_path / "street.jpg").symlink_to(image)
    (tmp_path / "block.py").write_text(block)
    printed = run_python(tmp_path, scenes, "block.py").splitlines()
    width, height = Image.open(image).size
    assert printed[-1] == f"[({height}, {width}), (80, {min(100, width)})]"
    assert re.fullmatch(r"\w+: \d+\.\d% of the image, mean probability 0\.\d\d", printed[0])
    assert Image.open(tmp_path / "mask.png").size == Image.open(tmp_path / "overlay.png").size == (width, height)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--format", "mmseg", "--out", "a.bin"], {}, r"--out a\.bin: a file of --format mmseg is recognised by"),
        (["--format", "mmseg", "--out", "a.pth"], {"WORLD_SIZE": "2"}, r"start it without a launcher\."),
    ],
)
def test_mistakes_are_named(tiny_config, trained, monkeypatch, arguments, environ, message):
    import argparse

    from ds_seg.commands import add_commands
    from ds_seg.errors import UserError

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    add_commands(parser)
    args = parser.parse_args(["export", str(tiny_config), str(trained), *arguments])
    with pytest.raises(UserError, match=message):
        args.run(args)
