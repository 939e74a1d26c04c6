checkpoint = "https://nowhere.example/a_network_that_is_replaced.pth"
backbone_norm_cfg = dict(type="LN", eps=1e-6, requires_grad=True)
model = dict(
    type="EncoderDecoder",
    pretrained=checkpoint,
    backbone=dict(type="VisionTransformer", embed_dims=768, norm_cfg=backbone_norm_cfg),
    decode_head=dict(type="SegmenterMaskTransformerHead", in_channels=768, channels=768, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(480, 480)),
)
