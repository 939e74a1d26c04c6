# UperNet and its auxiliary FCN head, which replace the linear head of a model.
# Source: OpenGVLab/InternVL segmentation/configs/intern_vit_6b/full_tuning, with MMSegmentation's upernet_r50.py.
norm_cfg = dict(type="SyncBN", requires_grad=True)
upernet = dict(
    _delete_=True,
    type="UPerHead",
    in_channels=[3200, 3200, 3200, 3200],
    in_index=[0, 1, 2, 3],
    pool_scales=(1, 2, 3, 6),
    channels=1536,
    dropout_ratio=0.1,
    num_classes=150,
    norm_cfg=norm_cfg,
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
)
upernet_auxiliary = dict(
    type="FCNHead",
    in_channels=3200,
    in_index=2,
    channels=1536,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.1,
    num_classes=150,
    norm_cfg=norm_cfg,
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
)
