# InternViT-6B-448px V1-2, V1-5 or V2_5 with four scales of four taps, and UperNet.
_base_ = ["internvit6b_448.py", "../heads/upernet.py"]
model = dict(
    backbone=dict(with_fpn=True, out_indices=[11, 22, 33, 44]),
    decode_head={{_base_.upernet}},
    auxiliary_head={{_base_.upernet_auxiliary}},
)
