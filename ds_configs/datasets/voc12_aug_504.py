"""Pascal VOC 2012 (21 classes) with the augmented annotations and crops of 504.

VOC_ROOT names the folder (VOCdevkit/VOC2012), with SegmentationClassAug and its split as MMSegmentation makes them.
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(
    type="PascalVOCDataset", data_root=os.environ.get("VOC_ROOT", "data/VOCdevkit/VOC2012"), img_dir="JPEGImages"
)
trained = train_pipeline((2016, 504), 504)
evaluated = dict(
    common,
    ann_dir="SegmentationClass",
    split="ImageSets/Segmentation/val.txt",
    pipeline=test_pipeline((2016, 504), *keep_ratio(504)),
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(
        common,
        ann_dir=["SegmentationClass", "SegmentationClassAug"],
        split=["ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/aug.txt"],
        pipeline=trained,
    ),
    val=evaluated,
    test=evaluated,
)
