"""Lines that a process among ranks prints."""

from __future__ import annotations

import sys

from ds_seg.distributed.world import is_main


def print_on_main(text: str) -> None:
    """Print on global rank 0; nothing elsewhere."""
    if is_main():
        print(text, flush=True)


def notify(text: str) -> None:
    """Tell the user something by standard error, whichever rank this is."""
    print(f"ds-seg: {text}", file=sys.stderr, flush=True)
