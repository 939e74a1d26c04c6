# InternViT-6B-448px-V1-0: all 48 blocks.
_base_ = "internvit6b_224.py"
model = dict(backbone=dict(pretrain_size=448))
