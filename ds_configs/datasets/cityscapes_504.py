"""Cityscapes (19 classes) at its own 2048 x 1024 with crops of 504.

CITYSCAPES_ROOT names the folder: leftImg8bit/{train,val}, gtFine/{train,val} with *_gtFine_labelTrainIds.png.
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(type="CityscapesDataset", data_root=os.environ.get("CITYSCAPES_ROOT", "data/cityscapes"))
trained = train_pipeline((2048, 1024), 504)
evaluated = dict(
    common,
    img_dir="leftImg8bit/val",
    ann_dir="gtFine/val",
    pipeline=test_pipeline((2048, 1024), *keep_ratio(504)),
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(common, img_dir="leftImg8bit/train", ann_dir="gtFine/train", pipeline=trained),
    val=evaluated,
    test=evaluated,
)
