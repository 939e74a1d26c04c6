"""Python's garbage collector, kept from going through what a start makes for good.

Importing torch and what stands on it makes a million objects and next to no garbage, and the collector looks at them
again and again meanwhile: a fifth of the processor time of a start.
"""

from __future__ import annotations

import gc


def pause_collector() -> None:
    """Collect nothing from now on: the imports come."""
    gc.disable()


def resume_collector() -> None:
    """Collect again, but leave alone for ever what is there now: the imports are done.

    Forked data workers profit too, whose collector would otherwise copy every page that it looks at.
    """
    gc.freeze()
    gc.enable()
