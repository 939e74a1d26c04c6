import pytest

from ds_seg.checkpoint import checkpoint_bytes
from ds_seg.checkpoint.sizes import format_gib


def test_what_a_checkpoint_consists_of():
    """The distributed tests compare this with files on the disk."""
    assert checkpoint_bytes(trained=1000, frozen=0, heads=10) == 12 * 1010
    assert checkpoint_bytes(trained=1000, frozen=0, heads=10, averaged=True) == 16 * 1010
    assert checkpoint_bytes(trained=0, frozen=1000, heads=10, head_buffers=3) == 2000 + 120 + 12
    assert checkpoint_bytes(trained=0, frozen=1000, heads=10, frozen_dtype_bytes=4) == 4120


def test_internvit_6b():
    assert checkpoint_bytes(trained=5_903_000_000, frozen=0, heads=0) / 1e9 == pytest.approx(70.8, abs=0.1)


@pytest.mark.parametrize(("count", "text"), [(101456789012, "94.49 GiB"), (1 << 30, "1.00 GiB"), (3 << 20, "3 MiB")])
def test_sizes_are_said_in_gib(count, text):
    assert format_gib(count) == text
