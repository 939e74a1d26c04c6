"""Files that can't be read: over the stated number an error with the list, within it replaced, listed, remembered."""

import json
import shutil

from ds_seg.tracking.metrics_log import read_metrics

TIMES = ("images_per_s", "data_wait_s", "memory_gib")
BAD = ("scene_00003.jpg", "scene_00007.jpg")


def read_run(work_dir):
    """Rows without times, and the list of replaced samples."""
    rows = read_metrics(work_dir / "metrics.jsonl")
    summary = json.loads((work_dir / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows], summary["bad_samples"]


def test_two_processes_replace_within_the_budget_and_a_resume_remembers(cli, scenes, tiny_config, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    cli.env["DS_SEG_DEMO_ROOT"] = str(root)
    for name in BAD:
        path = root / "images" / "training" / name
        path.write_bytes(path.read_bytes()[:-200])  # OpenCV would half-decode it

    train = ("train", tiny_config, "--work-dir", tmp_path / "run", "--cfg-options")
    refused = cli(*train, "data.max_bad_samples=1", "check_data=False", processes=2)
    assert refused.returncode == 2 and refused.stderr.count("ds-seg: ") == 1, refused.stderr
    assert "2 training samples can't be read, and data.max_bad_samples allows 1" in refused.stderr
    assert all(name in refused.stderr for name in BAD) and "Traceback" not in refused.stderr

    done = cli(*train, "data.max_bad_samples=2", processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert "2 files of data.train can't be read; other samples replace theirs" in done.stdout
    assert [done.stdout.count(f"replaced a training sample ({number} of at most 2)") for number in (1, 2)] == [1, 1]
    rows, bad = read_run(tmp_path / "run")
    assert {sample["file"].rpartition("/")[2] for sample in bad} == set(BAD)
    assert all("truncated or damaged" in sample["reason"] and sample["position"] < 32 for sample in bad)

    resume = ("train", tiny_config, "--work-dir", tmp_path / "run", "--resume", "step_000006", "--cfg-options")
    resumed = cli(*resume, "data.max_bad_samples=2", processes=2, launcher="torchrun")
    assert resumed.returncode == 0, resumed.stderr
    assert read_run(tmp_path / "run") == (rows, bad)
    assert "replaced a training sample" not in resumed.stdout
