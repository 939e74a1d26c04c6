"""The console: plain lines in a file, a bar on a terminal, the same facts in both."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_seg.tracking import console as console_module
from ds_seg.tracking.console import Console, LastingStream, format_row, track_images

ROW = {"step": 40, "loss": 0.5119, "lr_min": 1e-4, "lr_max": 5e-4, "grad_norm": 1.234, "grad_norm_clipped": 1.0}
ROW |= {"images_per_s": 12.34, "memory_gib": 0.91}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console_module.time, "perf_counter", lambda: now[0])
    return now


def test_a_file_gets_one_plain_line_a_step(clock):
    stream = io.StringIO()
    console = Console(200, stream=stream)
    clock[0] += 20.75
    console.log_step(ROW)

    assert stream.getvalue() == (
        "step 40/200  loss 0.512  lr 1.0e-04..5.0e-04  grad 1.23 (clipped)  12.3 img/s  0.9 GiB  ETA 0:01:23\n"
    )


def test_a_note_stands_last():
    for stream in (io.StringIO(), Terminal()):
        console = Console(200, stream=stream)
        console.log_step(ROW, "data wait 23%: try this")
        console.close()
        assert re.search(r"0\.9 GiB(  ETA \d:\d\d:\d\d)?  data wait 23%: try this", stream.getvalue())


def test_the_eta_of_a_resumed_run_counts_from_where_it_resumed(clock):
    stream = io.StringIO()
    console = Console(200, first_step=30, stream=stream)
    clock[0] += 50
    console.log_step(ROW)

    assert stream.getvalue().endswith("ETA 0:13:20\n")


def test_a_norm_that_was_not_clipped_says_so_by_silence():
    assert "(clipped)" not in format_row(ROW | {"grad_norm_clipped": ROW["grad_norm"]})


def test_facts_that_are_missing_are_left_out():
    assert format_row({"step": 1, "loss": None, "lr_max": 1e-3}) == "lr 1.0e-03..1.0e-03"


def test_the_last_miou_stays_in_sight():
    stream = io.StringIO()
    console = Console(200, stream=stream)
    console.log_evaluation(20, {"eval/mIoU": 0.4567}, "| table |")
    console.log_step(ROW)

    assert "evaluation at step 20\n| table |\n" in stream.getvalue()
    assert "mIoU 45.7%" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_same_facts_and_messages_above_it():
    stream = Terminal()
    console = Console(200, first_step=10, stream=stream)
    console.log_step(ROW)
    console.warn("look here")
    move = track_images(3, "evaluating", stream)
    for done in (1, 2, 3):
        move(done)
    console.close()

    text = stream.getvalue()
    assert "40/200" in text
    assert "loss 0.512  lr 1.0e-04..5.0e-04  grad 1.23 (clipped)  12.3 img/s  0.9 GiB" in text
    assert "warning: look here\n" in text
    assert "evaluating:   0%" in text
    assert "0/3" in text


def test_evaluation_in_a_file_prints_a_line_now_and_then(clock):
    stream = io.StringIO()
    move = track_images(100, "evaluating", stream)
    for done in range(1, 101):
        clock[0] += 1
        move(done)

    assert stream.getvalue().splitlines()[0] == "evaluating  15/100 images of this rank"
    assert len(stream.getvalue().splitlines()) == 6


def test_a_full_disk_below_standard_output_loses_lines_and_nothing_else():
    code = (
        "import sys; from ds_seg.tracking.console import Console, LastingStream\n"
        "sys.stdout = LastingStream(sys.stdout)\n"
        "console = Console(10)\nfor _ in range(3000): console.info('a line')\n"
        "assert not sys.stdout.isatty()"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_what_a_stream_takes_it_gets():
    stream = io.StringIO()
    print("text", file=LastingStream(stream), flush=True)
    assert stream.getvalue() == "text\n"


def test_a_character_that_the_stream_can_not_encode_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    print("\udce9 é", file=LastingStream(stream), flush=True)
    assert stream.buffer.getvalue() == rb"\udce9 \xe9" + b"\n"
