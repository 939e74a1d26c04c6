from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from ds_seg.data.bad_samples import UnreadableSample
from ds_seg.data.build import build_dataset
from ds_seg.data.loader import load_ahead
from ds_seg.data.training_batches import MicroBatch, build_train_loader
from ds_seg.errors import ConfigError, DataError, UserError

from mmseg.datasets import PIPELINES  # isort: skip

MakeCfg = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def read_batches(dataset: Any, **changes: Any) -> list[MicroBatch]:
    arguments = {
        "seed": 5, "micro_batch": 4, "accumulation_steps": 1, "rank": 0, "world_size": 1,
        "stop_step": 5, "num_workers": 0,
    }  # fmt: skip
    return list(build_train_loader(dataset, **{**arguments, **changes}))


def by_position(batches: Sequence[MicroBatch]) -> dict[int, tuple[torch.Tensor, torch.Tensor, str]]:
    return {
        position: (batch.images_B3HW[row], batch.labels_B1HW[row], batch.metas[row]["ori_filename"])
        for batch in batches
        for row, position in enumerate(batch.positions)
    }


def assert_same_samples(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> None:
    left, right = by_position(first), by_position(second)
    assert left.keys() == right.keys()
    for position in left:
        assert torch.equal(left[position][0], right[position][0])
        assert torch.equal(left[position][1], right[position][1])
        assert left[position][2] == right[position][2]


def test_micro_batches_have_the_promised_form(make_cfg: MakeCfg) -> None:
    batches = read_batches(build_dataset(make_cfg(), role="train"))
    assert [batch.positions for batch in batches] == [list(range(k * 4, k * 4 + 4)) for k in range(5)]
    for batch in batches:
        assert (batch.images_B3HW.shape, batch.images_B3HW.dtype) == ((4, 3, 28, 28), torch.float32)
        assert (batch.labels_B1HW.shape, batch.labels_B1HW.dtype) == ((4, 1, 28, 28), torch.int64)
        assert [meta["pad_shape"] for meta in batch.metas] == [(28, 28, 3)] * 4


@pytest.mark.parametrize("num_workers", [1, 3])
def test_same_bits_for_any_number_of_workers(make_cfg: MakeCfg, num_workers: int) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    plain, parallel = read_batches(dataset), read_batches(dataset, num_workers=num_workers)
    assert [batch.positions for batch in plain] == [batch.positions for batch in parallel]
    assert_same_samples(plain, parallel)


@pytest.mark.parametrize(
    ("world_size", "accumulation_steps", "micro_batch"), [(2, 1, 2), (4, 1, 1), (1, 2, 2), (2, 2, 1)]
)
def test_same_global_batch_for_any_world_size_and_accumulation(
    make_cfg: MakeCfg, world_size: int, accumulation_steps: int, micro_batch: int
) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    shares = [
        read_batches(
            dataset,
            rank=rank, world_size=world_size, accumulation_steps=accumulation_steps, micro_batch=micro_batch,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert {len(share) for share in shares} == {5 * accumulation_steps}
    plain = read_batches(dataset)
    for step in range(5):
        own = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
        assert_same_samples(plain[step : step + 1], [batch for share in shares for batch in share[own]])
    order = [position for batches in zip(*shares, strict=True) for batch in batches for position in batch.positions]
    assert order == list(range(20))


def test_resumed_stream_is_the_tail_of_the_whole_one(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    whole = read_batches(dataset, accumulation_steps=2, micro_batch=2)
    resumed = read_batches(dataset, accumulation_steps=2, micro_batch=2, start_step=3, num_workers=1)
    assert [batch.positions for batch in resumed] == [batch.positions for batch in whole[6:]]
    assert_same_samples(resumed, whole[6:])
    assert read_batches(dataset, start_step=5) == []


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_left_out_batches_are_passed_over_for_any_world_size(
    make_cfg: MakeCfg, world_size: int, micro_batch: int
) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    picked = [read_batches(dataset, start_step=batch, stop_step=batch + 1)[0] for batch in (0, 3, 4, 6)]
    shares = [
        read_batches(
            dataset, rank=rank, world_size=world_size, micro_batch=micro_batch, stop_step=4, left_out=[(1, 2), (5, 5)]
        )
        for rank in range(world_size)
    ]
    order = [position for batches in zip(*shares, strict=True) for batch in batches for position in batch.positions]
    assert order == [position for batch in picked for position in batch.positions]
    assert_same_samples(picked, [batch for share in shares for batch in share])


def break_pair(folder: Path, how: str) -> str:
    """Damage a pair of files; the name of its image."""
    image, label = folder / "images/train/street_2.jpg", folder / "annotations/train/street_2.png"
    if how == "vanished":
        image.unlink()
    elif how == "unlabelled":
        label.unlink()
    else:
        path = image if how == "truncated" else label
        path.write_bytes(path.read_bytes()[:-40])
    return image.name


@pytest.mark.parametrize("how", ["vanished", "unlabelled", "truncated", "truncated label"])
def test_a_sample_that_can_not_be_read_is_an_error_or_replaced_the_same_way_everywhere(
    make_cfg: MakeCfg, folder: Path, how: str
) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    whole = by_position(read_batches(dataset))
    name = break_pair(folder, how)
    with pytest.raises(UnreadableSample, match=r"street_2\.(jpg|png)"):
        read_batches(dataset)
    single = read_batches(dataset, max_bad_samples=3)
    got = by_position(single)
    for position, (image, label, file) in whole.items():
        if file != name:
            assert torch.equal(got[position][0], image) and torch.equal(got[position][1], label)
    bad = [replaced for batch in single for replaced in batch.replaced]
    assert [one.position for one in bad if one.position in whole] == [p for p, one in whole.items() if one[2] == name]
    assert {Path(one.file).name for one in bad} == {name} and all("street_2" in one.reason for one in bad)
    assert name not in {one[2] for one in got.values()}
    shares = [
        batch
        for rank in range(2)
        for batch in read_batches(dataset, rank=rank, world_size=2, micro_batch=2, num_workers=2, max_bad_samples=3)
    ]
    assert_same_samples(single, shares)
    assert sorted(one.position for batch in shares for one in batch.replaced) == [one.position for one in bad]
    assert_same_samples(single[3:], read_batches(dataset, start_step=3, max_bad_samples=3))


def test_more_bad_samples_in_one_place_than_allowed_are_an_error(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    for path in folder.glob("images/train/*.jpg"):
        path.write_bytes(b"no image")
    text = (
        r"3 training samples can't be read, and data\.max_bad_samples allows 2:\n  image .*not an image.*\(position 0\)"
    )
    with pytest.raises(DataError, match=text):
        read_batches(dataset, max_bad_samples=2)


def test_bytes_after_the_end_of_an_image_are_no_damage(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    whole = read_batches(dataset)
    for path in folder.glob("images/train/*.jpg"):
        path.write_bytes(path.read_bytes() + b"trailer")
    assert_same_samples(whole, read_batches(dataset))


def test_every_epoch_is_a_permutation_even_if_it_is_shorter_than_a_batch(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "three.txt").write_text("street_1\nstreet_2\nstreet_5\n")
    dataset = build_dataset(make_cfg(split="three.txt"), role="train")
    names = [meta["ori_filename"] for batch in read_batches(dataset, stop_step=30) for meta in batch.metas]
    epochs = [tuple(names[start : start + 3]) for start in range(0, 120, 3)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {("street_1.jpg", "street_2.jpg", "street_5.jpg")}
    assert len(set(epochs)) == 6  # of 40 epochs, every order occurs


def test_order_and_augmentation_follow_seed_and_position(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    first, other = by_position(read_batches(dataset)), by_position(read_batches(dataset, seed=6))
    assert [sample[2] for sample in first.values()] != [sample[2] for sample in other.values()]
    crops = [sample[0] for sample in first.values() if sample[2] == "street_0.jpg"]
    assert len(crops) >= 2
    assert not torch.equal(crops[0], crops[1])


@PIPELINES.register_module()
class DrawFromAllThree:
    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["draws"] = (random.random(), float(np.random.rand()), float(torch.rand(())))
        results["process"] = (cv2.getNumThreads(), torch.cuda.is_initialized())
        return results


def drawing_cfg(make_cfg: MakeCfg) -> dict[str, Any]:
    pipeline = copy.deepcopy(make_cfg()["pipeline"])
    pipeline.insert(2, {"type": "DrawFromAllThree"})
    pipeline[-1]["meta_keys"] = ("draws", "process")
    return make_cfg(pipeline=pipeline)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_processs_own_random_state_is_left_alone(make_cfg: MakeCfg, num_workers: int) -> None:
    dataset = build_dataset(drawing_cfg(make_cfg), role="train")

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seen = []
    for stop_step in (0, 3):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        batches = read_batches(dataset, stop_step=stop_step, num_workers=num_workers)
        seen.append(draw())
    assert seen[0] == seen[1]
    draws = [meta["draws"] for batch in batches for meta in batch.metas]
    assert len({value for triple in draws for value in triple}) == 36


def test_draws_do_not_depend_on_what_ran_before(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(drawing_cfg(make_cfg), role="train")
    seen = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        seen.append([meta["draws"] for batch in read_batches(dataset) for meta in batch.metas])
    assert seen[0] == seen[1]


def test_workers_keep_to_one_thread_and_off_the_gpu(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(drawing_cfg(make_cfg), role="train")
    (batch,) = read_batches(dataset, stop_step=1, num_workers=1)
    threads, cuda = batch.metas[0]["process"]
    assert threads <= 1
    assert not cuda


def test_workers_outlive_the_signals_that_ask_the_run_to_save_and_stop(make_cfg: MakeCfg) -> None:
    stream = build_train_loader(
        build_dataset(make_cfg(), role="train"),
        seed=0, micro_batch=2, accumulation_steps=1, rank=0, world_size=1, stop_step=40, num_workers=2,
    )  # fmt: skip
    for _ in range(2):  # one batch from each worker, so that both have started
        next(stream)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len(list(stream)) == 38


class NoSharedMemory(Dataset):
    """Its worker can't make a file of 1 KiB any more, as where /dev/shm is full."""

    def __init__(self) -> None:
        self.worker = multiprocessing.get_context("fork").Value("i")

    def __getitem__(self, _index: int) -> torch.Tensor:
        self.worker.value = os.getpid()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return torch.zeros(4096)


def test_a_batch_that_shared_memory_does_not_take_is_an_error_and_no_hang() -> None:
    def give_up(*_: object) -> None:
        raise TimeoutError

    dataset = NoSharedMemory()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    try:
        with pytest.raises(UserError, match=r"through /dev/shm \(\d+ of \d+ MiB are free there\): .*workers_per_gpu=0"):
            list(load_ahead(dataset, [[0]], lambda items: items[0], num_workers=1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not list(Path("/dev/shm").glob(f"torch_{dataset.worker.value}_*"))


def test_a_fork_waits_for_threads_that_hold_the_lock_of_pythons_threads() -> None:
    """A worker that is forked while a thread holds it hangs: of 3300 forks beside busy threads 3 did, of 5700 none."""
    code = (
        "import os, sys, ds_seg.data.loader\nevents = []\nsys.addaudithook(lambda event, _: events.append(event))\n"
        "if os.fork() == 0: os._exit(0)\nassert 'sys._current_frames' in events, events\nos.wait()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


EXITING_SCRIPT = """
import sys
from ds_seg.data.training_batches import build_train_loader
from mmseg.datasets import CustomDataset

class Numbers(CustomDataset):
    def __init__(self):
        self.file_client_args = dict(backend="none")
    def __len__(self):
        return 9
    def __getitem__(self, index):
        import torch
        return dict(img=torch.zeros(3, 4, 4), gt_semantic_seg=torch.zeros(1, 4, 4), img_metas={})

stream = build_train_loader(
    Numbers(), seed=0, micro_batch=2, accumulation_steps=1, rank=0, world_size=1, stop_step=10**6, num_workers=2
)
next(stream)
sys.exit(7)
"""


def test_process_that_exits_with_a_live_stream_does_not_hang() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", EXITING_SCRIPT], timeout=100, capture_output=True, text=True)
    assert done.returncode == 7 and not re.search("Error|Exception|Traceback", done.stderr), done.stderr
    assert time.monotonic() - start < 60  # measured 5 s, nearly all of it imports


def test_empty_dataset(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    dataset.img_infos = []
    with pytest.raises(DataError, match=r"training dataset has no image\. Point data\.train\.img_dir"):
        read_batches(dataset)


def read_failure(kind: type[Exception], dataset: Any, num_workers: int) -> str:
    with pytest.raises(kind) as caught:
        read_batches(dataset, num_workers=num_workers)
    return str(caught.value)


def test_unreadable_image_gives_one_clean_message_from_any_process(make_cfg: MakeCfg, folder: Path) -> None:
    path = folder / "images/train/street_4.jpg"
    path.write_bytes(b"not a picture")
    dataset = build_dataset(make_cfg(), role="train")
    message = read_failure(DataError, dataset, 0)
    assert message.startswith(f"image {path} (13 bytes): not an image")
    assert message.endswith("Replace or remove the file.")
    assert read_failure(DataError, dataset, 2) == message


def test_failing_pipeline_names_the_sample_and_the_place(make_cfg: MakeCfg) -> None:
    pipeline = [step for step in make_cfg()["pipeline"] if step["type"] != "LoadAnnotations"]
    dataset = build_dataset(make_cfg(pipeline=pipeline), role="train")
    message = read_failure(DataError, dataset, 0)
    assert "can be read, but its pipeline failed: KeyError: 'gt_semantic_seg' (" in message
    assert "images/train/street_" in message
    assert "Traceback" not in message
    assert read_failure(DataError, dataset, 1) == message


def test_an_image_that_opencv_can_not_decode_is_not_the_pipelines_fault(make_cfg: MakeCfg, folder: Path) -> None:
    for path in (folder / "images/train").iterdir():
        Image.fromarray(np.ones((44, 60), np.float32)).save(path.with_suffix(".tif"))
    cfg = make_cfg(type="FoldersDataset", classes=list("abcdefghijk"), img_suffix=".tif")
    message = read_failure(UnreadableSample, build_dataset(cfg, role="train"), 0)
    assert re.search(r"_\d\.tif \(\d+ bytes\): OpenCV can't decode it; save it as JPEG or PNG", message)


def test_pipeline_that_collects_no_labels(make_cfg: MakeCfg) -> None:
    pipeline = [*make_cfg()["pipeline"][:-1], {"type": "Collect", "keys": ["img"]}]
    dataset = build_dataset(make_cfg(pipeline=pipeline), role="train")
    for num_workers in (0, 1):
        message = read_failure(ConfigError, dataset, num_workers)
        assert "data.train.pipeline does not collect an image (C, H, W) and its labels (1, H, W). End it" in message


def test_pipeline_that_collects_labels_without_a_channel(make_cfg: MakeCfg) -> None:
    as_tensors = [{"type": "ImageToTensor", "keys": ["img"]}, {"type": "ToTensor", "keys": ["gt_semantic_seg"]}]
    pipeline = make_cfg()["pipeline"]
    dataset = build_dataset(make_cfg(pipeline=[*pipeline[:-2], *as_tensors, pipeline[-1]]), role="train")
    assert "does not collect an image (C, H, W) and its labels (1, H, W)" in read_failure(ConfigError, dataset, 0)


def test_labels_of_another_size_than_their_image(make_cfg: MakeCfg) -> None:
    pipeline = make_cfg()["pipeline"]
    rescale = {"type": "SegRescale", "scale_factor": 0.5}
    dataset = build_dataset(make_cfg(pipeline=[*pipeline[:-2], rescale, *pipeline[-2:]]), role="train")
    message = read_failure(DataError, dataset, 0)
    assert "image (28, 28), labels (14, 14)" in message and "such as SegRescale, out of data.train.pip" in message


def test_crops_of_different_sizes(make_cfg: MakeCfg) -> None:
    pipeline = [step for step in make_cfg()["pipeline"] if step["type"] != "Pad"]
    dataset = build_dataset(make_cfg(pipeline=pipeline), role="train")
    message = read_failure(DataError, dataset, 0)
    assert "differ in height and width: " in message
    assert "(28, 28)" in message
    assert "add Pad(size=S, pad_val=0, seg_pad_val=255) to data.train.pipeline" in message
    assert read_failure(DataError, dataset, 1) == message


def test_a_stream_left_early_ends_its_workers(make_cfg: MakeCfg) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    stream = build_train_loader(
        dataset, seed=0, micro_batch=2, accumulation_steps=1, rank=0, world_size=1, stop_step=10**9, num_workers=2
    )
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    start = time.monotonic()
    del stream
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 4  # measured 0.1 s; a worker that has to be killed takes 5 s
