import time

from ds_seg import distributed
from ds_seg.supervision.heartbeat import Heartbeat


class SlowStore:
    """Stands for a rendezvous store that takes its time."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        time.sleep(0.1)
        self.values[key] = value

    def multi_get(self, keys):
        return [self.values[key].encode() for key in keys]


def test_no_beat_is_under_way_after_the_last(monkeypatch):
    monkeypatch.setattr(distributed, "open_store", SlowStore)
    heartbeat = Heartbeat(interval_s=60)
    heartbeat.close()
    assert not heartbeat._thread.is_alive()
    assert heartbeat.answered >= 1 and not heartbeat.lost
