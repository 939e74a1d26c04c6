"""Faults that only MMCV's builders find are told by the config's keys."""

import pytest
from mmcv.utils import Registry

from ds_seg.config.build_errors import describe_build_error, describe_error, find_origin

PARTS = Registry("parts")


class Base:
    def __init__(self, width, *, scale=1):
        self.width = width


@PARTS.register_module()
class Inner(Base):
    def __init__(self, depth=1, **kwargs):
        super().__init__(**kwargs)


@PARTS.register_module()
class Outer:
    def __init__(self, parts):
        self.parts = [PARTS.build(part) for part in parts]


def fail(*parts):
    section = {"type": "Outer", "parts": list(parts)}
    with pytest.raises((KeyError, TypeError)) as caught:
        PARTS.build(section)
    return caught.value, section


@pytest.mark.parametrize(
    ("part", "described"),
    [
        (
            {"type": "Inner", "width": 1, "dept": 2},
            "model.parts[1].dept: unknown key. Did you mean 'depth'? Known here: depth, scale, width",
        ),
        (
            {"type": "Iner"},
            "model.parts[1].type: got 'Iner', which is not registered. Did you mean 'Inner'? A module of yours that "
            "registers it goes into custom_imports",
        ),
        ({"width": 3}, "model.parts[1]: got {'width': 3}, which has no `type`"),
        (
            {"type": "Inner"},
            "TypeError: Outer: Inner: Base.__init__() missing 1 required positional argument: 'width'",
        ),
    ],
)
def test_a_part_within_a_part_is_told_by_its_key(part, described):
    error, section = fail({"type": "Inner", "width": 2}, part)
    assert describe_build_error(error, "model", section) == described


def test_a_key_of_a_dict_which_mmcv_merges_into_that_of_a_base():
    section = {"type": "Inner", "width": 1, "dept": 2}
    with pytest.raises(TypeError) as caught:
        PARTS.build(section)
    assert describe_build_error(caught.value, "model.part", section).endswith(
        "width. What comes from _base_ goes with _delete_=True in your own file's section"
    )


def test_what_mmcv_did_not_raise_is_told_as_it_is():
    error = KeyError("x")
    assert find_origin(error) is error
    assert describe_build_error(error, "model", {}) == describe_error(error) == "KeyError: 'x'"
