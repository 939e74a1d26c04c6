"""Your own images and masks in two folders, with crops of 504: short side 504, sizes a multiple of 14.

data_root holds images/, masks/, train.txt and val.txt: see docs/own-data.md. A run gives the rest, as own_data.py does:
classes, data_root and the suffixes.
"""

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (504, 504)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=(2016, 504), ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(2016, 504),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="ResizeToMultiple", size_divisor=14),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
evaluated = dict(type="FoldersDataset", img_dir="images", ann_dir="masks", split="val.txt", pipeline=test_pipeline)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(type="FoldersDataset", img_dir="images", ann_dir="masks", split="train.txt", pipeline=train_pipeline),
    val=evaluated,
    test=evaluated,
)
