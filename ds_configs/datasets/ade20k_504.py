"""ADE20K as InternVL trains and tests it with crops of 504: short side 504, sizes a multiple of 14.

ADE20K_ROOT names the folder (ADEChallengeData2016). On the command line:
--cfg-options data.train.data_root=D data.val.data_root=D data.test.data_root=D
"""

import os

from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

common = dict(type="ADE20KDataset", data_root=os.environ.get("ADE20K_ROOT", "data/ade/ADEChallengeData2016"))
trained = train_pipeline((2016, 504), 504, reduce_zero_label=True)
evaluated = dict(
    common,
    img_dir="images/validation",
    ann_dir="annotations/validation",
    pipeline=test_pipeline((2016, 504), *keep_ratio(504)),
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(common, img_dir="images/training", ann_dir="annotations/training", pipeline=trained),
    val=evaluated,
    test=evaluated,
)
