# InternViT-300M-448px with four scales of four taps, and UperNet.
_base_ = ["internvit300m_448.py", "../heads/upernet_1024.py"]
model = dict(
    backbone=dict(with_fpn=True, out_indices=[5, 11, 17, 23]),
    decode_head={{_base_.upernet}},
    auxiliary_head={{_base_.upernet_auxiliary}},
)
