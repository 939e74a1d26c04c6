"""CamVid at 480 x 360, crops of 252, evaluated on whole images of 490 x 364.

CAMVID_ROOT names the folder; without it, ../shared/data/camvid beside the project. On the command line:
--cfg-options data.train.data_root=D data.val.data_root=D data.test.data_root=D
"""

import os

from ds_configs.pipelines import test_pipeline, train_pipeline

beside_the_project = os.path.normpath("{{ fileDirname }}/../../../shared/data/camvid")
common = dict(type="CamVidDataset", data_root=os.environ.get("CAMVID_ROOT", beside_the_project))
evaluated = dict(
    common,
    img_dir="images/val",
    ann_dir="annotations/val",
    pipeline=test_pipeline(
        (490, 364), dict(type="Resize", keep_ratio=False), dict(type="ResizeToMultiple", size_divisor=14)
    ),
)
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=2,
    train=dict(common, img_dir="images/train", ann_dir="annotations/train", pipeline=train_pipeline((480, 360), 252)),
    val=evaluated,
    test=evaluated,
)
