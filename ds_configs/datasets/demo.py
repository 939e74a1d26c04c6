"""The generated demo scenes (ds_seg.data.demo_scenes), with crops of 112.

DS_SEG_DEMO_ROOT moves the folder they are written to and read from.
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(type="DemoScenesDataset", data_root=os.environ.get("DS_SEG_DEMO_ROOT", "work_dirs/demo_data"))
trained = train_pipeline(None, 112, reduce_zero_label=True, ratio_range=(0.8, 1.25), colours=False)
evaluated = dict(
    common,
    img_dir="images/validation",
    ann_dir="annotations/validation",
    pipeline=test_pipeline(None, *keep_ratio()),
)
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=1,
    train=dict(common, img_dir="images/training", ann_dir="annotations/training", pipeline=trained),
    val=evaluated,
    test=evaluated,
)
