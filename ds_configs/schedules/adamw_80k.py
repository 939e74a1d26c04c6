# The published recipe: 80k steps of 16 crops, poly decay from step 0 times a linear warm-up.
_base_ = "default_runtime.py"
global_batch = 16
optimizer = dict(
    type="AdamW",
    lr=4e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
lr_config = dict(
    policy="poly", warmup="linear", warmup_iters=1500, warmup_ratio=1e-6, power=1.0, min_lr=0.0, by_epoch=False
)
runner = dict(type="IterBasedRunner", max_iters=80000)
