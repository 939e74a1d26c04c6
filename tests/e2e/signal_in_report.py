"""Sends SIGTERM to the process that is about to write a run's report; configs of tests import it."""

import os
import signal
import time

from ds_seg.supervision import stop
from ds_seg.tracking import report

_write_report = report.write_report


def write_report(work_dir, summary):
    os.kill(os.getpid(), signal.SIGTERM)
    while stop.requested() is None:
        time.sleep(0.01)
    return _write_report(work_dir, summary)


report.write_report = write_report
