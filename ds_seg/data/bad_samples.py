"""Training samples whose files can't be read, and the stated number of them that a run may replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ds_seg import distributed
from ds_seg.errors import DataError


@dataclass(frozen=True, order=True)
class BadSample:
    """A sample that was replaced."""

    position: int
    """In the global stream, where it was first met."""
    file: str
    """Its image."""
    reason: str


class UnreadableSample(DataError):
    """The image or annotation of a sample is damaged or gone; `file` is the image."""

    file: str = ""


def note_bad_samples(
    known: Sequence[BadSample], met: Iterable[BadSample], most: int, warn: Callable[[str], None]
) -> list[BadSample]:
    """Add what all ranks have met in a step, each file once; a collective over all ranks.

    Args:
        known: of earlier steps, the same on every rank.
        met: by this rank.
        most: files that may be replaced in the whole run, over all ranks.
        warn: is told of each file once.

    Returns:
        What is known now, the same on every rank.

    Raises:
        DataError: more files than that, with the list of them.
    """
    met = list(met)
    if not distributed.any_rank(bool(met)):
        return list(known)
    noted, files = list(known), {bad.file for bad in known}
    for bad in sorted(bad for rank in distributed.gather_objects(met) for bad in rank):
        if bad.file not in files:
            files.add(bad.file)
            noted.append(bad)
            warn(
                f"replaced a training sample ({len(noted)} of at most {most}): {bad.reason}; first met at position "
                f"{bad.position}"
            )
    if len(noted) > most:
        raise too_many_bad_samples(noted, most)
    return noted


def too_many_bad_samples(bad: Sequence[BadSample], most: int) -> DataError:
    """The error that names all of them."""
    listed = "\n".join(f"  {sample.reason} (position {sample.position})" for sample in bad)
    return DataError(
        f"{len(bad)} training samples can't be read, and data.max_bad_samples allows {most}:\n{listed}\n"
        "Repair or replace the files and resume, or allow more."
    )
