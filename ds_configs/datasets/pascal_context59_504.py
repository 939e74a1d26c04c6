"""Pascal Context with its 59 classes and crops of 504; the background is ignored.

PASCAL_CONTEXT_ROOT names the folder (VOCdevkit/VOC2010), with SegmentationClassContext as MMSegmentation converts it.
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(
    type="PascalContextDataset59",
    data_root=os.environ.get("PASCAL_CONTEXT_ROOT", "data/VOCdevkit/VOC2010"),
    img_dir="JPEGImages",
    ann_dir="SegmentationClassContext",
)
trained = train_pipeline((2016, 504), 504, reduce_zero_label=True)
evaluated = dict(
    common,
    split="ImageSets/SegmentationContext/val.txt",
    pipeline=test_pipeline((2016, 504), *keep_ratio(504)),
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(common, split="ImageSets/SegmentationContext/train.txt", pipeline=trained),
    val=evaluated,
    test=evaluated,
)
