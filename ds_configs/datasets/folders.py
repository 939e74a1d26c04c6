"""Your own images and masks in two folders, with crops of 504: short side 504, sizes a multiple of 14.

data_root holds images/, masks/, train.txt and val.txt: see docs/own-data.md. A run gives the rest, as own_data.py does:
classes, data_root and the suffixes.
"""

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(type="FoldersDataset", img_dir="images", ann_dir="masks")
evaluated = dict(common, split="val.txt", pipeline=test_pipeline((2016, 504), *keep_ratio()))
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(common, split="train.txt", pipeline=train_pipeline((2016, 504), 504)),
    val=evaluated,
    test=evaluated,
)
