# InternViT-6B-448px V1-2, V1-5 and V2_5: the last three blocks of the 224px release are gone.
_base_ = "internvit6b_224.py"
model = dict(backbone=dict(pretrain_size=448, depth=45, out_indices=[44]))
