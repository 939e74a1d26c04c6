"""The commands of `ds-seg`, one short file each."""

from __future__ import annotations

import argparse

from ds_seg.commands import demo, doctor, evaluate, export, plan, predict, train


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add every command to the parser; each sets `run`, which takes the parsed arguments."""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (train, evaluate, predict, export, plan, doctor, demo):
        command.add_parser(subparsers)
