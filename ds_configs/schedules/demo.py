_base_ = "default_runtime.py"
global_batch = 8
optimizer = dict(
    type="AdamW",
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
optimizer_config = dict(grad_clip=dict(max_norm=1.0))
lr_config = dict(
    policy="poly", warmup="linear", warmup_iters=30, warmup_ratio=0.1, power=1.0, min_lr=0.0, by_epoch=False
)
runner = dict(type="IterBasedRunner", max_iters=300)
log_config = dict(interval=10)
checkpoint_config = dict(interval=200)
evaluation = dict(interval=100)
