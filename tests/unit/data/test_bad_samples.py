import pytest

from ds_seg.data.bad_samples import BadSample, note_bad_samples
from ds_seg.errors import DataError


def bad(position, file="a.jpg"):
    return BadSample(position, file, f"image {file}: truncated. Replace it.")


def test_each_file_is_warned_about_and_counted_once():
    warnings = []
    known = note_bad_samples([], [bad(5), bad(3)], 2, warnings.append)
    known = note_bad_samples(known, [bad(19), bad(20, "b.jpg")], 2, warnings.append)
    assert known == [bad(3), bad(20, "b.jpg")]
    assert warnings == [
        "replaced a training sample (1 of at most 2): image a.jpg: truncated. Replace it.; first met at position 3",
        "replaced a training sample (2 of at most 2): image b.jpg: truncated. Replace it.; first met at position 20",
    ]
    text = r"3 training samples can't be read, and data\.max_bad_samples allows 2:\n.*a\.jpg.*\n.*b\.jpg.*\n.*c\.jpg"
    with pytest.raises(DataError, match=text):
        note_bad_samples(known, [bad(30, "c.jpg")], 2, warnings.append)
