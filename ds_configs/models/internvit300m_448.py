# InternViT-300M-448px: LayerNorm, biased QKV, no QK-norm.
_base_ = "internvit6b_224.py"
model = dict(
    backbone=dict(
        type="InternViT",
        pretrain_size=448,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        qkv_bias=True,
        qk_normalization=False,
        norm="layer",
        drop_path_rate=0.1,
        out_indices=[23],
    ),
    decode_head=dict(in_channels=1024, channels=1024),
)
