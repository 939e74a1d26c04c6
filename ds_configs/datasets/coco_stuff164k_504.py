"""COCO-Stuff-164K (171 classes) with crops of 504, as MMSegmentation's dataset guide lays it out.

COCO_STUFF_ROOT names the folder: images/{train2017,val2017}, annotations/{train2017,val2017}.
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(type="COCOStuffDataset", data_root=os.environ.get("COCO_STUFF_ROOT", "data/coco_stuff164k"))
trained = train_pipeline((2016, 504), 504)
evaluated = dict(
    common,
    img_dir="images/val2017",
    ann_dir="annotations/val2017",
    pipeline=test_pipeline((2016, 504), *keep_ratio(504)),
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(common, img_dir="images/train2017", ann_dir="annotations/train2017", pipeline=trained),
    val=evaluated,
    test=evaluated,
)
