"""A pipeline step that hangs for ever in one rank's data workers once a file is there; configs of tests import it."""

import os
import time
from pathlib import Path

from mmseg.datasets.builder import PIPELINES
from torch.utils.data import get_worker_info


@PIPELINES.register_module()
class HangWhen:
    """Hangs while `flag` exists; a file `RANK_hangs` beside it tells that it does."""

    def __init__(self, flag, rank):
        self.flag, self.rank = Path(flag), rank

    def __call__(self, results):
        if int(os.environ["RANK"]) == self.rank and get_worker_info() is not None and self.flag.exists():
            self.flag.with_name("hangs").touch()
            while True:
                time.sleep(1000)
        return results
