"""Files and folders that a user asks for: what can't be is said before the work begins, and else in one message."""

import argparse
import errno
import os
import signal
import subprocess
import sys

import pytest

from command_line import environment
from disks import read_only
from ds_seg import distributed
from ds_seg.__main__ import main
from ds_seg.commands import add_commands
from ds_seg.errors import UserError
from ds_seg.files import validate_output_file, validate_output_folder, write_text_atomic, writing


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_commands(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


@pytest.fixture
def alone(monkeypatch):
    """A process that joins no group."""
    monkeypatch.setattr(distributed, "initialize", lambda: None)


def test_what_is_not_there_yet_can_be_written_and_is_not_made(tmp_path):
    validate_output_file("--out", tmp_path / "new" / "a.json")
    validate_output_folder("--out", tmp_path / "new" / "masks")
    (tmp_path / "a.json").write_text("")
    validate_output_file("--out", tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_outputs_of_the_wrong_kind(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--json .* is a folder, but must be a file\. Choose another --j"):
        validate_output_file("--json", tmp_path)
    with pytest.raises(UserError, match=r"--out /dev/null is no regular file"):
        validate_output_file("--out", type(tmp_path)("/dev/null"))
    for check in (validate_output_folder, validate_output_file):
        with pytest.raises(UserError, match=r"--out: .*/file is a file, but must be a folder\. Choose another"):
            check("--out", tmp_path / "file" / "masks")


def test_a_folder_that_can_not_be_written(tmp_path):
    with (
        read_only(tmp_path),
        pytest.raises(UserError, match=r"--out: folder .* can't be written\. .* make it writable"),
    ):
        validate_output_file("--out", tmp_path / "new" / "a.json")


def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path):
    write_text_atomic(tmp_path / "a.py", f"data_root = '{os.fsdecode(bytes([233]))}'")
    assert (tmp_path / "a.py").read_text() == r"data_root = '\udce9'"


def test_a_disk_that_refuses_while_it_is_written(tmp_path):
    wanted = r"--out .*a\.json can't be written: .*No space left.* or make room there"
    with pytest.raises(UserError, match=wanted), writing("--out", tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "c.py", "w", "--out", "{folder}"], "is a folder, but must be a file"),
        (["predict", "c.py", "w", "i", "--out", "{file}"], "is a file, but must be a folder"),
        (["export", "c.py", "w", "--format", "mmseg", "--out", "{file}/a.pth"], "is a file, but must be a folder"),
        (["doctor", "--json", "{folder}"], "is a folder, but must be a file"),
        (["doctor", "c.py", "--json", "{file}/a.json"], "is a file, but must be a folder"),
        (["plan", "demo", "--gpus", "1", "--out", "{folder}"], "is a folder, but must be a file"),
        (["plan", "demo", "--gpus", "1", "--json", "{file}/a"], "is a file, but must be a folder"),
        (["plan", "demo", "--sweep", "1", "--chart", "{folder}"], "is a folder, but must be a file"),
        (["predict", "c.py", "w", "i", "--out", "{folder}", "--opacity", "3"], r"--opacity: got 3, want 0 to 1\."),
        (["predict", "c.py", "w", "i", "--out", "{folder}", "--opacity", "nan"], r"--opacity: got nan, want 0 to 1\."),
        (["evaluate", "c.py", "w", "--window-batch", "0"], r"--window-batch: got 0, want at least 1\."),
    ],
)
def test_commands_refuse_before_they_work(alone, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        run(*(argument.format(folder=tmp_path, file=tmp_path / "file") for argument in arguments))


@pytest.mark.parametrize("arguments", [["--resume", ""], ["--resume="], ["--work-dir", " "]])
def test_an_empty_argument_is_refused(arguments):
    command = [sys.executable, "-m", "ds_seg", "train", "demo", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "is empty: is a shell variable there not set?" in done.stderr


def test_closed_streams_are_no_fault(tmp_path):
    code = (
        "import os, sys\nfrom ds_seg import __main__, commands\n"
        "def run(_args): print('lost'); sys.stderr.flush(); return int(open(sys.argv[1], 'w').fileno() < 3)\n"
        "from ds_seg.commands import doctor\ndoctor.run = run\n__main__.main(['doctor'])"
    )
    command = ["bash", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, str(tmp_path / "file")]
    assert subprocess.run(command, env=environment(), timeout=60).returncode == 0


@pytest.mark.parametrize("command", ["doctor", "predict"])
def test_ctrl_c_is_told_in_words_that_fit_the_command(command):
    code = (
        f"from ds_seg.__main__ import main\nfrom ds_seg.commands import {command}\n"
        f"def interrupted(_args): raise KeyboardInterrupt\n{command}.run = interrupted\n"
        f"main({[command] if command == 'doctor' else [command, 'c', 'w', 'i', '--out', 'o']})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == f"ds-seg: {command} was interrupted; what it had written by then stays.\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "c", "--options", "a=1"], "--options a=1. --options of MMSegmentation is --cfg-options here."),
        (["evaluate", "c", "w", "--eval=mIoU"], "--eval=mIoU. --eval of MMSegmentation is not needed (every score is"),
        (["train", "c", "--auto_resume"], "--auto-resume. --auto-resume of MMSegmentation is --resume auto here."),
        (["train", "c", "--nothing", "x"], "--nothing x\n"),
    ],
)
def test_options_of_mmsegmentation_are_told_by_their_names_here(capsys, monkeypatch, arguments, told):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # main wraps them
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and f"error: unrecognized arguments: {told}" in capsys.readouterr().err


def test_a_user_without_a_home_directory_is_told_before_libraries_fail():
    code = (
        "import pathlib\nfrom ds_seg.__main__ import main\n"
        "def home(): raise RuntimeError\n"
        "pathlib.Path.home = home\nmain(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ds-seg: UserError: HOME is not set, and user ")
