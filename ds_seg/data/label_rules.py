"""What the ids in annotation files mean, and the usual mistakes in saying so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

IGNORED = -1
OUTSIDE = -2
_BOTH = "both in the dataset and in its pipeline's LoadAnnotations"


@dataclass(frozen=True)
class LabelRule:
    """How a dataset turns the ids of its annotation files into classes."""

    num_classes: int
    ignore_index: int = 255
    reduce_zero_label: bool = False
    """Whether 0 is ignored and every other id is one too high."""
    label_map: tuple[tuple[int, int], ...] = ()
    """(id in the file, id that replaces it), where the config picks some of a dataset's classes."""

    @property
    def first_id(self) -> int:
        """Id of the first class."""
        return int(self.reduce_zero_label)

    @property
    def last_id(self) -> int:
        """Id of the last class."""
        return self.num_classes - 1 + self.first_id

    def class_of(self, label: int) -> int:
        """The class that an id stands for, IGNORED, or OUTSIDE where it stands for none."""
        if not 0 <= label <= 255:
            return OUTSIDE
        label = dict(self.label_map).get(label, label) % 256
        if self.reduce_zero_label:
            label = 255 if label in (0, 255) else label - 1
        if label == self.ignore_index:
            return IGNORED
        return label if label < self.num_classes else OUTSIDE

    def describe_allowed(self) -> str:
        """The ids that may occur, for people."""
        candidates = sorted({0, self.ignore_index + self.first_id, 255})
        ignored = [str(label) for label in candidates if self.class_of(label) == IGNORED]
        listed = " and ".join(ignored) or "none"
        return f"{self.first_id}..{self.last_id} ({listed} {'are' if len(ignored) > 1 else 'is'} ignored)"


PixelCounts: TypeAlias = Mapping[LabelRule, Mapping[int, int]]
"""Rule -> how often each id occurs in the annotations that follow it."""


def add_counts(parts: Iterable[PixelCounts]) -> dict[LabelRule, Counter[int]]:
    """The counts of several parts of a dataset together."""
    total: dict[LabelRule, Counter[int]] = {}
    for part in parts:
        for rule, pixels_by_id in part.items():
            total.setdefault(rule, Counter()).update(pixels_by_id)
    return total


def explain_wrong_ids(pixels_by_id: Mapping[int, int], rule: LabelRule) -> str | None:
    """The likely reason for ids outside the classes, with its cure.

    Args:
        pixels_by_id: how often each id occurs in all annotations that follow `rule`.
        rule: of the dataset.

    Returns:
        A sentence or two; None if no id is outside.
    """
    wrong = sorted(label for label in pixels_by_id if rule.class_of(label) == OUTSIDE)
    if not wrong:
        return None
    if 0 in wrong and rule.reduce_zero_label:
        return (
            f"reduce_zero_label=True makes 255 of id 0, which ignore_index={rule.ignore_index} does not ignore. Set "
            "ignore_index=255 in the dataset and in the heads, and write 255 for all other pixels that don't count."
        )
    last = wrong[-1]
    off_by_one = wrong == [rule.last_id + 1] and not rule.label_map
    if off_by_one and not rule.reduce_zero_label and 0 not in pixels_by_id and 1 in pixels_by_id:
        return (
            f"Ids run from 1 to {last}, and 0 never occurs: they start at 1 where MMSeg starts at 0. Set "
            f"reduce_zero_label=True, {_BOTH}."
        )
    if off_by_one:
        name_it = (
            f"Ids run up to {last}, but {rule.num_classes} classes end at {rule.last_id}: the class count is off by "
            f"one. If every id is a class, name the missing one in `classes` and set num_classes={rule.num_classes + 1}"
        )
        ignore_it = f"; if 0 means 'no class', set reduce_zero_label=True, {_BOTH}"
        return f"{name_it}{'' if rule.reduce_zero_label else ignore_it}."
    if last <= 254 and all(label in pixels_by_id for label in range(rule.first_id, last + 1)) and not rule.label_map:
        needed = last + 1 - rule.first_id
        return (
            f"All ids from {rule.first_id} to {last} occur, which makes {needed} classes where the config has "
            f"{rule.num_classes}: name them all in `classes` and set num_classes={needed}."
        )
    return (
        "Ids in these files must be rewritten as the numbers of the classes, in the order of `classes`, or as "
        f"{rule.ignore_index} for pixels that don't count; or correct `classes`, num_classes and reduce_zero_label."
    )


def find_nothing_labelled(counts: PixelCounts) -> str | None:
    """What is wrong with a split whose every pixel is ignored, with the cure; None if one counts, or there is none."""
    ids = {label for pixels_by_id in counts.values() for label in pixels_by_id}
    if not ids or any(rule.class_of(label) != IGNORED for rule, found in counts.items() for label in found):
        return None
    listed = ", ".join(map(str, sorted(ids)))
    return f"Every pixel is ignored: only the ids {listed} occur. Correct reduce_zero_label or the masks."


def find_mistakes(splits: Mapping[str, PixelCounts]) -> list[tuple[str, str]]:
    """`find_rule_mistakes` in all splits together, which alone can tell them from a rare class.

    Args:
        splits: dotted config field -> its counts.

    Returns:
        Dotted config fields with commas between them, and a mistake in them with its cure.
    """
    return [
        (", ".join(field for field, counts in splits.items() if rule in counts), mistake)
        for rule, pixels_by_id in add_counts(splits.values()).items()
        for mistake in find_rule_mistakes(pixels_by_id, rule)
    ]


def find_rule_mistakes(pixels_by_id: Mapping[int, int], rule: LabelRule) -> list[str]:
    """Ids that are all allowed, but tell that the rule is another one than the annotations were written for.

    Args:
        pixels_by_id: how often each id occurs in all annotations of all splits.
        rule: of the datasets.

    Returns:
        A sentence or two a mistake, with the cure.
    """
    ids = set(pixels_by_id)
    if not ids:
        return []
    if ids == {0, 255} and rule.ignore_index == 255:
        return [
            "The masks hold only 0 and 255, and 255 is ignored, so that nothing but 0 would be learned: they are "
            "black and white pictures, not ids. Write 1 (white) as the id of the second class in place of 255."
        ]
    unreduced = set(range(rule.num_classes))
    if rule.reduce_zero_label and rule.num_classes > 1 and ids - {255} == unreduced:
        share = pixels_by_id[0] / sum(pixels_by_id.values())
        return [
            f"reduce_zero_label=True ignores id 0 ({100 * share:.0f} % of all pixels) and takes 1..{rule.last_id} for "
            f"the classes, but {rule.last_id} never occurs: ids 0..{rule.last_id - 1} look like the "
            f"{rule.num_classes} classes, each taken for its neighbour. Set reduce_zero_label=False, {_BOTH}."
        ]
    return []
