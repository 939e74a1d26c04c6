from __future__ import annotations

import re

import pytest

from ds_seg.data.label_rules import (
    IGNORED,
    OUTSIDE,
    LabelRule,
    explain_wrong_ids,
    find_mistakes,
    find_nothing_labelled,
    find_rule_mistakes,
)

PLAIN = LabelRule(num_classes=3)
REDUCED = LabelRule(num_classes=3, reduce_zero_label=True)
REDUCED_TO_200 = LabelRule(num_classes=3, ignore_index=200, reduce_zero_label=True)


def test_ids_become_classes_as_mmseg_makes_them() -> None:
    assert [PLAIN.class_of(label) for label in (0, 2, 3, 255, 256, -1)] == [0, 2, OUTSIDE, IGNORED, OUTSIDE, OUTSIDE]
    assert [REDUCED.class_of(label) for label in (0, 1, 3, 4, 255)] == [IGNORED, 0, 2, OUTSIDE, IGNORED]
    assert (REDUCED.first_id, REDUCED.last_id) == (1, 3)
    mapped = LabelRule(num_classes=2, label_map=((0, 255), (1, 0), (2, 1)))
    assert [mapped.class_of(label) for label in (0, 1, 2, 3, 255)] == [IGNORED, 0, 1, OUTSIDE, IGNORED]
    assert LabelRule(num_classes=3, ignore_index=2).class_of(2) == IGNORED


def test_allowed_ids_are_described() -> None:
    assert PLAIN.describe_allowed() == "0..2 (255 is ignored)"
    assert REDUCED.describe_allowed() == "1..3 (0 and 255 are ignored)"
    assert REDUCED_TO_200.describe_allowed() == "1..3 (201 is ignored)"


def test_no_wrong_ids_need_no_explanation() -> None:
    assert explain_wrong_ids({0: 9, 2: 9, 255: 9}, PLAIN) is None
    assert explain_wrong_ids({}, PLAIN) is None


@pytest.mark.parametrize(
    ("ids", "rule", "message"),
    [
        ((1, 2, 3, 255), PLAIN, r"Ids run from 1 to 3, and 0 never occurs.*Set reduce_zero_label=True, both"),
        ((0, 1, 3), PLAIN, r"3 classes end at 2: the class count is off by one.*num_classes=4; if 0 means 'no class'"),
        ((0, 1, 4), REDUCED, r"3 classes end at 3: the class count is off by one.*num_classes=4\.$"),
        ((0, 1, 2, 3, 4, 5), PLAIN, r"All ids from 0 to 5 occur, which makes 6 classes where .* 3.*num_classes=6"),
        ((0, 1, 2, 3, 4, 5), REDUCED, r"All ids from 1 to 5 occur, which makes 5 classes"),
        ((0, 76, 150), PLAIN, r"must be rewritten as the numbers of the classes.*num_classes and reduce_zero_label"),
        ((0, 300), PLAIN, r"must be rewritten"),
        (
            (0, 1, 2, 201),
            REDUCED_TO_200,
            r"makes 255 of id 0, which ignore_index=200 does not ignore\. Set ignore_index=255",
        ),
    ],
)
def test_wrong_ids_are_explained_with_the_cure(ids: tuple[int, ...], rule: LabelRule, message: str) -> None:
    assert re.search(message, explain_wrong_ids(dict.fromkeys(ids, 10), rule) or "")


@pytest.mark.parametrize(
    ("ids", "rule", "message"),
    [
        ((0, 255), PLAIN, r"hold only 0 and 255, and 255 is ignored.*Write 1 \(white\) as the id of the second class"),
        ((0, 255), REDUCED, r"hold only 0 and 255"),
        ((0, 1, 2), REDUCED, r"ignores id 0 \(33 % of all pixels\) and takes 1\.\.3.*3 never occurs.*Set reduce"),
        ((0, 1, 2, 255), REDUCED, r"each taken for its neighbour\. Set reduce_zero_label=False, both"),
    ],
)
def test_allowed_ids_that_tell_of_a_mistake(ids: tuple[int, ...], rule: LabelRule, message: str) -> None:
    (found,) = find_rule_mistakes(dict.fromkeys(ids, 10), rule)
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ((0, 1, 2, 255), PLAIN),
        ((0, 1, 2, 3), REDUCED),
        ((0, 1, 3), REDUCED),
        ((1, 2), REDUCED),
        ((0, 1), REDUCED),
        ((0, 255), LabelRule(256, ignore_index=254)),
        ((), PLAIN),
    ],
)
def test_what_may_be_on_purpose_is_no_mistake(ids: tuple[int, ...], rule: LabelRule) -> None:
    assert find_rule_mistakes(dict.fromkeys(ids, 10), rule) == []


@pytest.mark.parametrize(("label", "rule"), [(255, PLAIN), (0, REDUCED), (2, LabelRule(3, ignore_index=2))])
def test_a_split_of_which_nothing_counts(label: int, rule: LabelRule) -> None:
    found = find_nothing_labelled({rule: {label: 9}})
    assert found == f"Every pixel is ignored: only the ids {label} occur. Correct reduce_zero_label or the masks."
    assert find_nothing_labelled({rule: {label: 9}, LabelRule(9): {0: 1}}) is None
    assert find_nothing_labelled({rule: {}}) is find_nothing_labelled({}) is None


def test_mistakes_are_looked_for_in_all_splits_together() -> None:
    train, val = {REDUCED: {0: 5, 1: 5, 2: 5}}, {REDUCED: {0: 1, 1: 1}}
    ((fields, mistake),) = find_mistakes({"data.train": train, "data.val": val, "data.test": {PLAIN: {0: 1}}})
    assert fields == "data.train, data.val" and "id 0 (35 % of all pixels)" in mistake
    assert find_mistakes({"data.train": train, "data.val": {REDUCED: {3: 1}}}) == []
