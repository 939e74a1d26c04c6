# UperNet on the frozen InternViT-300M-448px on ADE20K. No published figure. Not run here.
# Plan: 8 GPUs of 80 GiB, 5 GiB used on each, 0.75 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit300m_448_upernet.py", "../datasets/ade20k_504.py", "../schedules/head_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0), auxiliary_head=dict(in_index=1))
load_from = "pretrained/InternViT-300M-448px"
