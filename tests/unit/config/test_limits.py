import pytest

from ds_seg.config.faults import Faults
from ds_seg.config.limits import read_max_time, read_watchdog_timeout
from ds_seg.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("23:30", 84600), ("0:01", 60), ("00:00:40", 40), ("1-00:00", 86400), ("2-03:04:05", 183845), ("100:00", 360000)],
)
def test_times_are_read_as_slurm_writes_them(given, seconds):
    assert read_max_time(given, Faults("run")) == seconds


@pytest.mark.parametrize("given", ["90", "1:60", "00:00", "1-", "a:b", "-1:00", ""])
def test_other_times_are_refused(given):
    faults = Faults("run")
    assert read_max_time(given, faults) is None
    with pytest.raises(ConfigError, match=rf"--max-time: got '{given}', want HH:MM, HH:MM:SS or D-HH:MM\[:SS\]"):
        faults.raise_if_any()


def test_there_is_no_limit_unless_one_is_given():
    faults = Faults("run")
    assert read_max_time(None, faults) is None
    assert [read_watchdog_timeout(given, faults) for given in (None, 0.0, 2.5)] == [600.0, 0.0, 2.5]
    faults.raise_if_any()


def test_a_negative_watchdog_timeout_is_refused():
    faults = Faults("run")
    read_watchdog_timeout(-1.0, faults)
    with pytest.raises(ConfigError, match=r"--watchdog-timeout: got -1\.0, want at least 0"):
        faults.raise_if_any()
