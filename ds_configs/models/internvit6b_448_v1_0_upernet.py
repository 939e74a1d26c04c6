# InternViT-6B-448px-V1-0 with four scales of four taps, and UperNet.
_base_ = ["internvit6b_448_v1_0.py", "../heads/upernet.py"]
model = dict(
    backbone=dict(with_fpn=True, out_indices=[11, 23, 35, 47]),
    decode_head={{_base_.upernet}},
    auxiliary_head={{_base_.upernet_auxiliary}},
)
