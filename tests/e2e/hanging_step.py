"""A pipeline step that hangs for ever in one rank's data workers once a file is there; configs of tests import it."""

import os
import time
from pathlib import Path

from mmseg.datasets.builder import PIPELINES
from torch.utils.data import get_worker_info


@PIPELINES.register_module()
class HangWhen:
    """Hangs on `rank` while `flag` exists; a file `FLAG_loads_RANK` beside it tells which ranks' workers load then."""

    def __init__(self, flag, rank):
        self.flag, self.rank = Path(flag), rank

    def __call__(self, results):
        if get_worker_info() is not None and self.flag.exists():
            rank = int(os.environ["RANK"])
            self.flag.with_name(f"{self.flag.name}_loads_{rank}").touch()
            while rank == self.rank:
                time.sleep(1000)
        return results
