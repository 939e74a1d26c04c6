# 120 steps of 4 crops: minutes on two CPU cores. The head starts from nothing, so it learns twenty times faster.
_base_ = "default_runtime.py"
global_batch = 4
optimizer = dict(
    type="AdamW",
    lr=5e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay_rate=1.0, custom_keys=dict(decode_head=dict(lr_mult=20.0))),
)
lr_config = dict(
    policy="poly", warmup="linear", warmup_iters=12, warmup_ratio=0.1, power=1.0, min_lr=0.0, by_epoch=False
)
runner = dict(type="IterBasedRunner", max_iters=120)
log_config = dict(interval=1)
checkpoint_config = dict(interval=120)
evaluation = dict(interval=120)
