_base_ = [
    "../_base_/models/segmenter.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_2.py",
]
deepspeed = True
deepspeed_config = "zero_configs/adam_zero1_bf16.json"
pretrained = "./pretrained/tiny.pth"
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="InternViT6B",
        pretrain_size=56,
        img_size=56,
        patch_size=14,
        embed_dim=32,
        depth=4,
        num_heads=2,
        mlp_ratio=4.0,
        qkv_bias=False,
        drop_path_rate=0.0,
        init_values=0.1,
        with_cp=True,
        use_flash_attn=True,
        qk_normalization=True,
        layerscale_no_force_fp32=True,
        freeze_vit=True,
        out_indices=[3],
        pretrained=pretrained,
    ),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=32,
        channels=32,
        num_convs=0,
        dropout_ratio=0.0,
        concat_input=False,
        num_classes=150,
        with_norm=True,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    test_cfg=dict(mode="slide", crop_size=(56, 56), stride=(42, 42)),
)
optimizer = dict(
    _delete_=True,
    type="AdamW",
    lr=4e-5,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    constructor="CustomLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=4, layer_decay_rate=1.0),
)
lr_config = dict(
    _delete_=True,
    policy="poly",
    warmup="linear",
    warmup_iters=1,
    warmup_ratio=1e-6,
    power=1.0,
    min_lr=0.0,
    by_epoch=False,
)
data = dict(samples_per_gpu=2)
runner = dict(type="IterBasedRunner")
if deepspeed:
    checkpoint_config = dict(deepspeed=deepspeed, by_epoch=False, interval=2, max_keep_ckpts=2)
else:
    checkpoint_config = dict(by_epoch=False, interval=2, max_keep_ckpts=2)
evaluation = dict(interval=2, metric="mIoU", save_best="auto")
custom_hooks = [
    dict(type="ToBFloat16Hook", priority=49),
]
