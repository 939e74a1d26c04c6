# Linear probe of the frozen InternViT-300M-448px on ADE20K. No published figure. Not run here.
# Plan: 8 GPUs of 80 GiB, 3 GiB used on each, 0.71 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit300m_448.py", "../datasets/ade20k_504.py", "../schedules/probe_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0))
load_from = "pretrained/InternViT-300M-448px"
